"""How rows of tokens are kept on disk, and what that costs in precision.

| `storage_dtype`              | tensors                                      | bytes a frame | exact |
|------------------------------|----------------------------------------------|---------------|-------|
| `uint8`, `uint16` (VQ)       | `indices` (N, n)                             | n, 2n         | yes   |
| `float32`                    | `tokens` (N, n·a)                            | 4·n·a         | yes   |
| `float16`, `bfloat16`        | `tokens` (N, n·a)                            | 2·n·a         | no    |
| `int8`                       | `tokens` (N, n·a), `row_scale` float32 (N,)  | n·a + 4       | no    |

int8 is symmetric, a scale for each row: token = `tokens * row_scale`, `row_scale` = max|row| / 127. A row of
zeros is exactly zero in each of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS_STORAGE, VQ
from lerobot_lam_diffusion.utils.errors import TokenStoreError, UserError

INT8_LEVELS = 127


class StoredRows(NamedTuple):
    """Rows as a store keeps them: name → tensor `(b, ...)`, and the largest error of any number in them."""

    tensors: dict[str, Tensor]
    max_error: float = 0.0


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


def storage_dtype_of(token_kind: str, wanted: str, num_codes: int) -> str:
    """`storage_dtype` of a store: VQ has one choice, continuous tokens are float32 unless told otherwise.

    Raises:
        UserError: not one of those that continuous tokens have.
    """
    if token_kind == VQ:
        return str(index_dtype(num_codes)).removeprefix("torch.")
    if wanted and wanted not in CONTINUOUS_STORAGE:
        raise UserError(
            f"continuous tokens cannot be stored as {wanted!r}; expected one of {list(CONTINUOUS_STORAGE)}"
        )
    return wanted or "float32"


def row_tensors(token_kind: str, storage_dtype: str, num_slots: int, width: int) -> dict[str, tuple]:
    """Name → dtype and shape of one row, of the tensors that hold a store's rows."""
    dtype = getattr(torch, storage_dtype)
    if token_kind == VQ:
        return {"indices": (dtype, (num_slots,))}
    rows: dict[str, tuple] = {"tokens": (dtype, (num_slots * width,))}
    return rows | ({"row_scale": (torch.float32, ())} if storage_dtype == "int8" else {})


def encode_indices(indices: Tensor, num_codes: int) -> StoredRows:
    """Code indices `(b, n)` as rows.

    Raises:
        ValueError: an index lies outside the codebook, or they are no integers.
    """
    if indices.is_floating_point() or indices.is_complex():
        raise ValueError(f"code indices are {indices.dtype}, expected integers")
    if indices.numel():
        wide = indices.int() if indices.dtype == torch.uint16 else indices  # torch has no uint16 minimum
        least, most = int(wide.min()), int(wide.max())
        if least < 0 or most >= num_codes:
            raise ValueError(f"code indices {least} to {most}, but the codebook has {num_codes} rows")
    return StoredRows({"indices": indices.to(index_dtype(num_codes)).cpu()})


def encode_tokens(tokens: Tensor, storage_dtype: str) -> StoredRows:
    """Tokens `(b, n·a)` as rows of `storage_dtype`, with the error that this makes.

    Raises:
        UserError: NaN or Inf among them, or a number that `storage_dtype` cannot hold.
    """
    tokens = tokens.float().cpu()
    if not tokens.isfinite().all():
        raise TokenStoreError("tokens hold NaN or Inf; the LAM or its input is damaged, nothing was stored")
    if storage_dtype == "int8":
        scale = tokens.abs().amax(1) / INT8_LEVELS
        levels = (tokens / scale.unsqueeze(1)).nan_to_num(0.0, 0.0, 0.0).round()  # x / 0: a row of zeros
        values = levels.clamp(-INT8_LEVELS, INT8_LEVELS).to(torch.int8)
        tensors = {"tokens": values, "row_scale": scale}
    else:
        tensors = {"tokens": tokens.to(getattr(torch, storage_dtype))}
    if storage_dtype == "float32":
        return StoredRows(tensors)
    error = (decode_tokens(**tensors) - tokens).abs()
    largest = float(error.max()) if error.numel() else 0.0
    if not largest < float("inf"):
        raise TokenStoreError(
            f"a token holds the number {float(tokens.abs().max()):.3g}, more than {storage_dtype} can; store "
            "them with --storage_dtype=float32, or bfloat16, which has float32's range at half its size"
        )
    return StoredRows(tensors, largest)


def decode_tokens(tokens: Tensor, row_scale: Tensor | None = None) -> Tensor:
    """Stored tokens `(..., n·a)`, of int8 with `row_scale` `(...)`, as float32."""
    if row_scale is None:
        return tokens.float()
    return tokens.float().mul_(row_scale.unsqueeze(-1))
