"""Read a dataset's column of tokens from its data files, and check every value of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.column import TokenColumn
from lerobot_lam_diffusion.tokens.dataset_check import read_frames
from lerobot_lam_diffusion.tokens.layout import not_finite
from lerobot_lam_diffusion.tokens.provenance import VQ
from lerobot_lam_diffusion.tokens.store import BLOCK_ROWS, TokenStore
from lerobot_lam_diffusion.utils.errors import DatasetError, raise_problems


def open_column(column: TokenColumn, meta: Any) -> TokenStore:
    """The column as a store, in memory: n·a float32 numbers for each frame of the dataset.

    Args:
        meta: `LeRobotDatasetMetadata` of its dataset, whose data files are on this machine.

    Raises:
        TokenStoreError: a row is not n·a numbers, or the rows are not those of the dataset's frames.
    """
    values = torch.zeros(meta.total_frames, column.token_dim)
    for path, table, frames in read_frames(meta, [column.key]):
        values[frames.start : frames.stop] = _tokens(path, table, column)[: len(frames)]
    root = Path(meta.root)
    return TokenStore.in_memory(root, meta, values, column.kind, column.frame_stride, column.provenance)


def _tokens(path: Path, table: pa.Table, column: TokenColumn) -> Tensor:
    """Tokens `(rows, n·a)` of a file."""
    rows = table[column.key].combine_chunks()
    flat = rows
    while pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        flat = flat.flatten()
    if len(flat) != len(rows) * column.token_dim or flat.null_count or not pa.types.is_floating(flat.type):
        raise DatasetError(
            f"{path}: a row of {column.key!r} is not {column.token_dim} numbers; add the column again with "
            "lerobot-lam-tokens add-column"
        )
    tokens = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(rows), column.token_dim)
    return torch.from_numpy(tokens)


def check_values(column: TokenColumn, store: TokenStore, codebook: Tensor | None = None) -> int:
    """Check that every row agrees with the column's provenance.

    Args:
        store: The opened column.
        codebook: float32 `(K, a)`, codebook of the LAM that made VQ tokens, if available.

    Returns:
        Number of missing tokens: the first `frame_stride` rows of each episode, all of them zero.

    Raises:
        UserError: NaN or Inf; a zero row where there should be a token, or a nonzero row where there should
            be none; VQ rows that are not in the codebook, or more distinct ones than it has.
    """
    name = f"column {column.key!r} of {store.path}"
    problem = not_finite(store.values, "token")
    if problem:
        raise DatasetError(f"{name}: {problem}. Add the column again with lerobot-lam-tokens add-column")
    missing = store.missing_rows()
    zero = ~store.values.any(1)
    filled, empty = missing & ~zero, ~missing & zero
    if codebook is not None and not codebook.any(1).all():
        empty &= False  # a code of zeros makes tokens of zeros
    problems = [
        f"{int(rows.sum())} frames {what}, the first is frame {int(rows.nonzero()[0, 0])} of the dataset"
        for rows, what in (
            (filled, f"less than {column.frame_stride} after their episode's start have a token"),
            (empty, "that should have a token have none (zeros)"),
        )
        if rows.any()
    ]
    if column.kind == VQ:
        problems += _code_problems(column, store.values[~missing], codebook)
    raise_problems(
        f"{name} is not what it says; add it again with lerobot-lam-tokens add-column", problems, DatasetError
    )
    return int(missing.sum())


def _code_problems(column: TokenColumn, tokens: Tensor, codebook: Tensor | None) -> list[str]:
    """Whether each of the n vectors of each token is, bit for bit, a row of the codebook."""
    lam = column.provenance.lam
    vectors = tokens.reshape(-1, lam.action_latent_dim)
    kinds = torch.empty(0, lam.action_latent_dim)
    for block in vectors.split(BLOCK_ROWS):
        kinds = torch.cat([kinds, block]).unique(dim=0)
        if len(kinds) > lam.num_codes:
            return [f"its vectors are of more kinds than the codebook's {lam.num_codes} rows"]
    if codebook is None or not len(kinds):
        return []
    strange = ~(kinds.unsqueeze(1) == codebook).all(-1).any(1)
    if not strange.any():
        return []
    return [f"{int(strange.sum())} of its {len(kinds)} kinds of vectors are not in the LAM's codebook"]
