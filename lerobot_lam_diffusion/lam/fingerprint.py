"""Which LAM made a token: a hash of everything that determines one, and of nothing else."""

import hashlib
import json
import os
from pathlib import Path

from .config import LamConfig, read_config
from .locating import resolve_lam
from .weights import Weights, open_weights

_KNOWN: dict[tuple, str] = {}
_MOST_KNOWN = 64


def fingerprint_of(path: str | Path, revision: str | None = None) -> str:
    """SHA-256 (hex) of a model's encoder and codebook tensors and of the dimensions that shape a token.

    The FDM, the description and training-only settings do not enter. Computed once in a process for each
    state of the two files.

    Raises:
        LamError: if there is no such model, or a file of it cannot be read.
    """
    folder = resolve_lam(path, revision)
    config = read_config(folder)
    with open_weights(folder) as weights:
        return fingerprint_of_weights(weights, config)


def fingerprint_of_weights(weights: Weights, config: LamConfig) -> str:
    """`fingerprint_of` a model whose files are open already."""
    dimensions = json.dumps(config.encoder_dict(), sort_keys=True)
    status = os.fstat(weights.file.fileno())
    # The inode and its last change tell a file that was replaced by one of the same size and time.
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known = (dimensions, *state)
    if known not in _KNOWN:
        while len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[known] = _hash(weights, dimensions)
    return _KNOWN[known]


def _hash(weights: Weights, dimensions: str) -> str:
    digest = hashlib.sha256(dimensions.encode())
    for key in sorted(key for key in weights.entries if key.startswith(("encoder.", "vq."))):
        entry = weights.entries[key]
        digest.update(f"{key} {entry.dtype} {list(entry.shape)}".encode())
        for block in weights.blocks(key):
            digest.update(block)
    return digest.hexdigest()
