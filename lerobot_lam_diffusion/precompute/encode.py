"""Encode: frame pairs through the LAM, always in batches of one shape.

A kernel's rounding depends on the batch's shape, so the last, shorter batch is padded: a token does not
depend on how many pairs happened to travel with it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lerobot_lam_diffusion.precompute.pairs import PairBatch


class PairEncoder:
    """Gives the stored values of frame pairs.

    Args:
        lam: What `load_lam` returns.
        batch_size: The one batch size that the LAM sees.
        use_vq_tokens: Store code indices, or the vectors before quantisation.
    """

    def __init__(self, lam: Any, batch_size: int, use_vq_tokens: bool) -> None:
        self._lam = lam
        self._batch_size = batch_size
        self._use_vq_tokens = use_vq_tokens

    def empty_values(self, num_rows: int) -> Tensor:
        """Zeros for `num_rows` tokens: code indices `(N, n)` uint8/int32, or float32 `(N, n·a)`."""
        if not self._use_vq_tokens:
            return torch.zeros(num_rows, self._lam.token_dim)
        dtype = torch.uint8 if self._lam.num_codes <= 256 else torch.int32
        return torch.zeros(num_rows, self._lam.num_learned_tokens, dtype=dtype)

    def __call__(self, batch: PairBatch) -> Tensor:
        """Values of the batch's pairs, `(B, n)` or `(B, n·a)`, on the CPU."""
        count = len(batch.rows)
        pad = (0, 0, 0, 0, 0, 0, 0, self._batch_size - count)
        prev, cur = (
            F.pad(frames, pad).to(self._lam.device, non_blocking=True) for frames in (batch.prev, batch.cur)
        )
        tokens = self._lam.encode_pairs(prev, cur)
        values = tokens.indices if self._use_vq_tokens else tokens.continuous
        return values[:count].cpu()
