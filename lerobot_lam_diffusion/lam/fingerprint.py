"""Which LAM made a token: a hash of everything that determines one, and of nothing else."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open

from .config import CONFIG_FILE, read_config
from .locating import WEIGHTS_FILE, resolve_lam


def fingerprint_of(path: str | Path, revision: str | None = None) -> str:
    """SHA-256 (hex) of a model's encoder and codebook tensors and of the dimensions that shape a token.

    The FDM, the description and training-only settings do not enter. Computed once in a process for each
    state (size and modification time) of the two files.

    Raises:
        LamError: if there is no such model.
    """
    folder = resolve_lam(path, revision)
    return _fingerprint(folder, _stamp(folder / CONFIG_FILE), _stamp(folder / WEIGHTS_FILE))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _fingerprint(folder: Path, config_stamp: tuple[int, int], weights_stamp: tuple[int, int]) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps(read_config(folder).encoder_dict(), sort_keys=True).encode())
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
        for key in sorted(key for key in weights.keys() if key.startswith(("encoder.", "vq."))):  # noqa: SIM118
            tensor = weights.get_tensor(key)
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
