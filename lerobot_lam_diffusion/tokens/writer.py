"""Write a token store so that it appears whole or not at all."""

import math
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE, sha256_of
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.store import TokenStore


def refuse_existing(folder: Path) -> None:
    """Refuse to write where something is already, or where nothing can be.

    Raises:
        FileExistsError: `folder` is a file or a folder that is not empty.
        NotADirectoryError, PermissionError: no folder can be made there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists already and is not empty; choose another --output_dir or remove it first"
        )
    ground = next(parent for parent in folder.resolve().parents if parent.exists())
    if not ground.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made: {ground} is a file; choose another --output_dir")
    if not os.access(ground, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{folder} cannot be made: {ground} is not writable; choose another --output_dir"
        )


def index_dtype(num_codes: int) -> torch.dtype:
    """The smallest of uint8 and uint16 that holds an index of `num_codes` codes.

    Raises:
        ValueError: neither does.
    """
    if num_codes > 1 << 16:
        raise ValueError(
            f"a codebook of {num_codes} rows, expected at most 65536: indices are stored as uint16"
        )
    return torch.uint8 if num_codes <= 256 else torch.uint16


def write_store(
    folder: Path,
    provenance: Provenance,
    values: Tensor,
    codebook: Tensor,
    episode_from: Tensor,
    episode_to: Tensor,
    covered: Tensor,
) -> TokenStore:
    """Write the two files beside `folder` and rename them into place.

    Args:
        folder: Where the store will stand; must not exist, or be empty.
        provenance: What the tokens are; the tensors' hash is filled in here.
        values: VQ: code indices `(N, n)`. Continuous: float32 `(N, n·a)`. N: frames of the covered
            episodes, in order.
        codebook: float32 `(K, a)`.
        episode_from, episode_to: int64 `(E,)`, boundaries of all the dataset's episodes.
        covered: bool `(E,)`, which of them `values` holds.

    Returns:
        The store, opened and checked.

    Raises:
        FileExistsError: see `refuse_existing`.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    refuse_existing(folder)
    folder = folder.resolve()  # "." has no name to write beside, a link cannot be renamed onto
    lengths = (episode_to - episode_from) * covered
    tensors = {
        "episode_from": episode_from,
        "episode_to": episode_to,
        "episode_row": torch.where(covered, torch.cumsum(lengths, 0) - lengths, -1),
    }
    if provenance.token_kind == VQ:
        tensors |= {"indices": values.to(index_dtype(len(codebook))), "codebook": codebook.float().cpu()}
    else:
        tensors |= {"tokens": values.float()}

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        partial.chmod(0o755)  # mkdtemp makes private folders
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS_FILE)
        provenance = replace(provenance, tensors_sha256=sha256_of(partial / TENSORS_FILE))
        (partial / PROVENANCE_FILE).write_text(provenance.to_json(), encoding="utf-8")
        for name in (TENSORS_FILE, PROVENANCE_FILE):
            (partial / name).chmod(0o644)  # safetensors makes its files private
            _flush(partial / name)
        partial.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenStore.open(folder)


def _flush(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's entries, before anything relies on them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def codebook_scale(codebook: Tensor) -> float:
    """RMS of the codebook's entries (1 for a codebook of zeros): what the policy divides tokens by."""
    return math.sqrt(float(codebook.double().square().mean())) or 1.0
