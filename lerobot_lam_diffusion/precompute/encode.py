"""Encode: frame pairs through the LAM, always in batches of one shape.

A kernel's rounding depends on the batch shape, so the last, shorter batch is padded: a token does not
depend on how many other pairs are in its batch.
"""

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lerobot_lam_diffusion.precompute.pairs import PairBatch

LARGEST_BATCH = {"cuda": 1024, "mps": 256, "cpu": 64}
LONGEST_TRIAL_S = 1.0
ENOUGH_S = 0.3
WORTH_DOUBLING = 1.05


class PairEncoder:
    """Gives the stored values of frame pairs.

    Args:
        lam: What `load_lam` returns.
        batch_size: The one batch size that the LAM sees.
        use_vq_tokens: Store code indices, or the vectors before quantisation.
    """

    def __init__(self, lam: Any, batch_size: int, use_vq_tokens: bool) -> None:
        self.lam = lam
        self.batch_size = batch_size
        self._use_vq_tokens = use_vq_tokens

    def __call__(self, batch: PairBatch) -> Tensor:
        """Values of the batch's pairs, `(B, n)` or `(B, n·a)`, on the CPU."""
        count = len(batch.rows)
        pad = (0, 0, 0, 0, 0, 0, 0, self.batch_size - count)
        prev, cur = (F.pad(frames, pad).to(self.lam.device) for frames in (batch.prev, batch.cur))
        tokens = self.lam.encode_pairs(prev, cur)
        values = tokens.stored(self._use_vq_tokens)
        return values[:count].cpu()


def find_batch_size(lam: Any, num_pairs: int) -> int:
    """The batch size at which the LAM encodes fastest here: doubled while that pays and fits in memory.

    It does not change VQ tokens. The trial takes seconds.

    Args:
        num_pairs: Pairs available; a larger batch only adds padding.
    """
    size, best_rate = 8, 0.0
    while True:
        try:
            seconds = _seconds_of(lam, size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return max(1, size // 4)  # half of what fits alone: decoded frames wait in memory too
        rate = size / seconds
        if rate < best_rate * WORTH_DOUBLING:
            return size // 2
        if seconds > LONGEST_TRIAL_S or 2 * size > min(num_pairs, LARGEST_BATCH.get(lam.device.type, 64)):
            return size
        size, best_rate = 2 * size, rate


def _seconds_of(lam: Any, batch_size: int) -> float:
    """Time to encode one batch: the fastest of a few, after a warm-up."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2 * batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    prev, cur = lam.resize(noise).chunk(2)
    lam.encode_pairs(prev[:1], cur[:1]).continuous.cpu()  # libraries load, kernels are chosen
    times: list[float] = []
    while len(times) < 4 and sum(times) < ENOUGH_S:
        started = time.perf_counter()
        lam.encode_pairs(prev, cur).continuous.cpu()
        times.append(time.perf_counter() - started)
    return min(times)
