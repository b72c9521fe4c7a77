"""Write a token store so that it appears whole or not at all."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lerobot_lam_diffusion.tokens.checked import note, place_of
from lerobot_lam_diffusion.tokens.layout import (
    EPISODE_HASH,
    PROVENANCE_FILE,
    TENSORS_FILE,
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
from lerobot_lam_diffusion.utils.errors import TokenStoreError, first_line
from lerobot_lam_diffusion.utils.files import refuse_existing, spread_mode, whole_or_nothing


def write_store(
    folder: Path,
    provenance: Provenance,
    blocks: Iterable[Tensor | StoredRows],
    codebook: Tensor,
    episode_from: Tensor,
    episode_to: Tensor,
    covered: Tensor,
    episode_hash: Tensor | None = None,
) -> TokenStore:
    """Write tokens, block by block, as a store: two files in a folder next to `folder`, renamed into place.

    Args:
        folder: Where to create the store; must not exist or must be empty.
        provenance: What the tokens are, with `storage_dtype` saying how to store continuous ones (empty:
            float32). The tensors' hash and `max_error` are filled in here.
        blocks: Consecutive rows in order. VQ: integer code indices `(b, n)`. Continuous: float32
            `(b, n·a)`. Or rows that are encoded already. Together they hold one row for each frame of the
            covered episodes. Only one block is in memory at a time.
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

    If any of these is raised, nothing is left behind.
    """
    refuse_existing(folder)
    folder = folder.resolve()
    storage = storage_dtype_of(provenance.token_kind, provenance.storage_dtype, len(codebook))
    provenance = replace(provenance, storage_dtype=storage)
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

    with whole_or_nothing(folder) as partial:
        partial.mkdir()
        shapes = tensor_layout(provenance, int(lengths.sum()))
        max_error = _write_tensors(partial, shapes, known, _encoded(blocks, provenance, len(codebook)))
        provenance = replace(
            provenance, tensors_sha256=sha256_of(partial / TENSORS_FILE), max_error=max_error
        )
        (partial / PROVENANCE_FILE).write_text(provenance.to_json(), encoding="utf-8")
        spread_mode(partial)  # `save_file` makes private files
        stamp = stamp_of(partial)  # a renamed folder's files keep their inodes and times
    note(place_of("checked", folder), stamp, True)  # every value was checked on its way in
    return TokenStore.load(folder)


def _encoded(
    blocks: Iterable[Tensor | StoredRows], provenance: Provenance, num_codes: int
) -> Iterator[StoredRows]:
    """The blocks as a store keeps them, at most `BLOCK_ROWS` rows of a tensor at a time."""
    for block in blocks:
        if isinstance(block, StoredRows):
            yield block
            continue
        for part in block.split(BLOCK_ROWS):
            if provenance.token_kind == VQ:
                yield encode_indices(part, num_codes)
            else:
                yield encode_tokens(part, provenance.storage_dtype)


def _write_tensors(
    folder: Path,
    shapes: dict[str, tuple[torch.dtype, tuple]],
    known: dict[str, Tensor],
    rows: Iterable[StoredRows],
) -> float:
    """Write the tensor file of `folder`; the largest error of its rows.

    Rows go to plain files first, which `save_file` then reads as mapped tensors: one block is in memory at
    a time, however large the store is.
    """
    max_error = 0.0
    written = {name: 0 for name in shapes if name not in known}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in written}
        for tensors, error in rows:
            for name, tensor in tensors.items():
                dtype, shape = shapes[name]
                if (tensor.dtype, tensor.shape[1:]) != (dtype, shape[1:]):
                    raise ValueError(
                        f"rows of {name} are {tensor.dtype} {tuple(tensor.shape[1:])}, expected {dtype} "
                        f"{shape[1:]}"
                    )
                files[name].write(tensor.contiguous().view(torch.uint8).numpy())
                written[name] += len(tensor)
            max_error = max(max_error, error)
    mapped = {name: _mapped(folder / name, *shapes[name], written[name]) for name in written}
    try:
        save_file(known | mapped, folder / TENSORS_FILE)
    except SafetensorError as error:  # the disk is full
        raise OSError(f"writing {folder / TENSORS_FILE}: {first_line(error)}") from error
    for name in written:
        (folder / name).unlink()
    return max_error


def _mapped(path: Path, dtype: torch.dtype, shape: tuple[int, ...], num_rows: int) -> Tensor:
    if num_rows != shape[0]:
        raise ValueError(f"{num_rows} rows of {path.name}, expected {shape[0]}: one for each covered frame")
    numel = math.prod(shape)
    if not numel:
        return torch.empty(shape, dtype=dtype)
    try:
        return torch.from_file(str(path), shared=False, size=numel, dtype=dtype).view(shape)
    except RuntimeError as error:
        raise OSError(
            f"{path} cannot be mapped into memory ({first_line(error)}). If its file system maps no files, "
            "choose an --output_dir on another one"
        ) from error
