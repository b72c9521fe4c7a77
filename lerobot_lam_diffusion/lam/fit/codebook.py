"""Codebook training: initialisation from data, moving averages, and restarts of dead rows."""

import torch
from torch import Tensor

from ..quantizer import Quantizer

_DEAD_SHARE = 0.05
"""A row used less than this times the even share is restarted."""


def kmeans(points: Tensor, count: int, generator: torch.Generator, rounds: int = 30) -> Tensor:
    """Centres of `points` (S, a) by Lloyd's rounds from a k-means++ start: float32 (count, a)."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(count - 1):
        nearest = torch.cdist(points, centres).amin(dim=1).square() + 1e-12
        chosen = torch.multinomial(nearest.cpu(), 1, generator=generator)
        centres = torch.cat([centres, points[chosen]])
    for _ in range(rounds):
        owner = torch.cdist(points, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        sizes = torch.bincount(owner, minlength=count).unsqueeze(1)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


class CodebookAverages:
    """Codebook rows as moving averages of the slots that chose them.

    Attributes:
        counts: float32 (K,), how often a row is chosen in a step.
        sums: float32 (K, a), sum of the slots that chose it.
    """

    def __init__(self, vq: Quantizer, decay: float):
        self.vq, self.decay = vq, decay
        rows = vq.embedding.weight.detach()
        self.counts = torch.ones_like(rows[:, 0])
        self.sums = rows.clone()

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Set the rows."""
        self.vq.embedding.weight.copy_(rows)
        self.counts = torch.ones_like(rows[:, 0])
        self.sums = rows.clone()

    @torch.no_grad()
    def update(self, slots: Tensor, indices: Tensor, generator: torch.Generator, restart: bool) -> None:
        """Move the rows towards `slots` (S, a) that chose them (`indices` (S,)).

        Where `restart` is set, rows that hardly anything chose move to random slots of this batch.
        """
        chosen = torch.bincount(indices, minlength=len(self.counts)).to(slots.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, indices, slots)
        self.counts.mul_(self.decay).add_(chosen, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        if restart:
            even = self.counts.mean()
            dead = (self.counts < _DEAD_SHARE * even).nonzero().flatten()
            picks = torch.randint(len(slots), (len(dead),), generator=generator).to(slots.device)
            self.counts[dead] = even
            self.sums[dead] = slots[picks] * even
        self.vq.embedding.weight.copy_(self.sums / self.counts.clamp(min=1e-6).unsqueeze(1))
