"""Write a token store so that it appears whole or not at all."""

import glob
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.checked import remember
from lerobot_lam_diffusion.tokens.layout import (
    EPISODE_HASH,
    PROVENANCE_FILE,
    TENSORS_FILE,
    TokenStoreError,
    sha256_of,
    stamp_of,
    tensor_layout,
    unknown_hashes,
)
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.storage import (
    StoredRows,
    encode_indices,
    encode_tokens,
    storage_dtype_of,
)
from lerobot_lam_diffusion.tokens.store import BLOCK_ROWS, TokenStore
from lerobot_lam_diffusion.tokens.tensor_file import TensorFileWriter, fsync
from lerobot_lam_diffusion.utils.files import partial_folder


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


def write_store(
    folder: Path,
    provenance: Provenance,
    blocks: Iterable[Tensor],
    codebook: Tensor,
    episode_from: Tensor,
    episode_to: Tensor,
    covered: Tensor,
    episode_hash: Tensor | None = None,
) -> TokenStore:
    """Write tokens, block by block, as a store: two files beside `folder`, renamed into place.

    Args:
        folder: Where the store will stand; must not exist, or be empty.
        provenance: What the tokens are, and in `storage_dtype` how to keep them (continuous tokens; empty:
            float32). The tensors' hash and `max_error` are filled in here.
        blocks: Consecutive rows in order. VQ: integer code indices `(b, n)`. Continuous: float32
            `(b, n·a)`. Together one row for each frame of the covered episodes. One block is in memory at a
            time.
        codebook: float32 `(K, a)`.
        episode_from, episode_to: int64 `(E,)`, boundaries of all the dataset's episodes.
        covered: bool `(E,)`, which of them `blocks` hold.
        episode_hash: uint8 `(E, 16)`, see `episode_hashes.py`; None: not known.

    Returns:
        The store, opened.

    Raises:
        FileExistsError: see `refuse_existing`; also if another process made the store in the meantime.
        UserError: tokens that are not finite, or that `storage_dtype` cannot hold.
        ValueError: fewer or more rows than covered frames, or indices outside the codebook.
        OSError: the disk is full or not writable.

    After any of them nothing is left behind.
    """
    storage = storage_dtype_of(provenance.token_kind, provenance.storage_dtype, len(codebook))
    parts = (part for block in blocks for part in block.split(BLOCK_ROWS))
    if provenance.token_kind == VQ:
        rows = (encode_indices(part, len(codebook)) for part in parts)
    else:
        rows = (encode_tokens(part, storage) for part in parts)
    provenance = replace(provenance, storage_dtype=storage, max_error=0.0)
    return write_rows(folder, provenance, rows, codebook, episode_from, episode_to, covered, episode_hash)


def write_rows(
    folder: Path,
    provenance: Provenance,
    rows: Iterable[StoredRows],
    codebook: Tensor,
    episode_from: Tensor,
    episode_to: Tensor,
    covered: Tensor,
    episode_hash: Tensor | None = None,
) -> TokenStore:
    """`write_store` of rows that are encoded already; `provenance.max_error` is what they cost so far."""
    refuse_existing(folder)
    folder = folder.resolve()  # "." has no name to write beside, a link cannot be renamed onto
    lengths = (episode_to - episode_from) * covered
    known = {
        "episode_from": episode_from,
        "episode_to": episode_to,
        "episode_row": torch.where(covered, torch.cumsum(lengths, 0) - lengths, -1),
        EPISODE_HASH: unknown_hashes(len(covered)) if episode_hash is None else episode_hash,
    }
    if provenance.token_kind == VQ:
        known["codebook"] = codebook.float().cpu()
        if not known["codebook"].isfinite().all():
            raise TokenStoreError("the LAM's codebook holds NaN or Inf; its weights are damaged")

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(folder)
    try:
        shapes = tensor_layout(provenance, int(lengths.sum()))
        max_error = _write_tensors(partial / TENSORS_FILE, shapes, known, rows)
        provenance = replace(
            provenance,
            tensors_sha256=sha256_of(partial / TENSORS_FILE),
            max_error=max(provenance.max_error, max_error),
        )
        (partial / PROVENANCE_FILE).write_text(provenance.to_json(), encoding="utf-8")
        for name in (TENSORS_FILE, PROVENANCE_FILE):
            fsync(partial / name)
        stamp = stamp_of(partial)  # a renamed folder's files keep their inodes and times
        into_place(partial, folder)
        fsync(folder.parent)
    except OSError as error:
        if error.errno and error.filename is None:  # a write does not say of which file
            raise OSError(error.errno, f"{error.strerror}: writing a token store", str(folder)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    remember(folder, stamp)  # every value was checked on its way in
    return TokenStore.load(folder)


def _write_tensors(
    path: Path,
    shapes: dict[str, tuple[torch.dtype, tuple]],
    known: dict[str, Tensor],
    rows: Iterable[StoredRows],
) -> float:
    """Write the tensor file; the largest error of its rows."""
    max_error = 0.0
    with TensorFileWriter(path, shapes) as file:
        for name, tensor in known.items():
            file.write(name, tensor)
        for tensors, error in rows:
            for name, tensor in tensors.items():
                file.write(name, tensor)
            max_error = max(max_error, error)
    return max_error


def into_place(partial: Path, folder: Path) -> None:
    """Rename a finished folder to its name, where nothing or an empty folder is.

    Raises:
        FileExistsError: something was written there meanwhile, and stays.
        OSError: it cannot be renamed.
    """
    try:
        partial.rename(folder)
    except OSError:
        refuse_existing(folder)
        if not folder.exists():
            raise
        folder.rmdir()  # some file systems rename nothing onto an empty folder
        partial.rename(folder)


def remove_partial(folder: Path) -> None:
    """Remove what writers of `folder` left that were killed; no other may be at work."""
    folder = folder.resolve()
    for partial in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        shutil.rmtree(partial, ignore_errors=True)
