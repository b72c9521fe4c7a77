"""The tokens of a store as small integers, whichever kind they are: what the report counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lerobot_lam_diffusion.lam.fit.report import evenly
from lerobot_lam_diffusion.tokens.store import BLOCK_ROWS, TokenStore

MOST_FRAMES = 400_000
"""Larger stores are sampled by whole episodes up to so many frames: memory stays bounded."""
DIRECTIONS = 3
BINS = 8
PRINCIPAL_TOKENS = 20_000
"""The directions are those of at most so many tokens."""


@dataclass(frozen=True)
class Codes:
    """One row for each frame that has a token, M in all, ascending.

    Attributes:
        frames, episodes: int64 (M,), absolute.
        labels: int64 (M, n), 0..num_codes-1. VQ: the code in each slot. Continuous: the token's place along
            each of the first principal directions, in bins that hold equally many tokens.
        num_codes: K, or the number of bins.
        slots: names of the columns of `labels`.
        is_vq: whether labels are VQ codes; if not, they are bins along principal directions.
        drawn: whether episodes were left out because the store is large.
    """

    frames: Tensor
    episodes: Tensor
    labels: Tensor
    num_codes: int
    slots: list[str]
    is_vq: bool
    drawn: bool

    def shares(self, slot: int) -> Tensor:
        """Double (K,): how often each code occurs."""
        return torch.bincount(self.labels[:, slot], minlength=self.num_codes).double() / max(
            len(self.labels), 1
        )

    def transitions(self, slot: int) -> Tensor:
        """Double (K, K): of the tokens with a code (row), how many are followed by each code (column)."""
        label, K = self.labels[:, slot], self.num_codes
        follows = (self.episodes[1:] == self.episodes[:-1]) & (self.frames[1:] == self.frames[:-1] + 1)
        counts = torch.bincount((label[:-1] * K + label[1:])[follows], minlength=K * K).view(K, K).double()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)


def read_codes(store: TokenStore, episodes: list[int], seed: int) -> Codes:
    """Codes of those episodes' tokens; `episodes` are covered by the store."""
    order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, total = [], 0
    for place in order:
        if total < MOST_FRAMES:
            chosen.append(episodes[place])
            total += int(store.episode_to[episodes[place]] - store.episode_from[episodes[place]])
    spans = [
        (episode, int(store.episode_from[episode]) + store.frame_stride, int(store.episode_to[episode]))
        for episode in sorted(chosen)
    ]
    spans = [(episode, start, stop) for episode, start, stop in spans if start < stop]
    nothing = torch.empty(0, dtype=torch.int64)
    frames = torch.cat([nothing, *(torch.arange(start, stop) for _, start, stop in spans)])
    numbers = torch.cat([nothing, *(torch.full((stop - start,), e) for e, start, stop in spans)])
    rows = store.episode_row[numbers] + frames - store.episode_from[numbers]
    drawn = len(chosen) < len(episodes)
    if store.codebook is not None:
        labels = store.values[rows].long()
        slots = [f"slot {slot}" for slot in range(labels.shape[1])]
        return Codes(frames, numbers, labels, len(store.codebook), slots, True, drawn)
    labels, variance = _along_directions(store, rows)
    slots = [f"direction {at + 1} ({share:.0%} of the variance)" for at, share in enumerate(variance)]
    return Codes(frames, numbers, labels, BINS, slots, False, drawn)


def principal_directions(tokens: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Mean (D) and first directions (k, D) of tokens (M, D), double, and their shares of the variance."""
    tokens = tokens.double()
    mean = tokens.mean(0)
    _, spread, basis = torch.linalg.svd(tokens - mean, full_matrices=False)
    basis = basis[:DIRECTIONS]
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()  # a sign of its own choice
    shares = (spread.square() / spread.square().sum().clamp(min=1e-30))[:DIRECTIONS].tolist()
    return mean, basis, shares


def _along_directions(store: TokenStore, rows: Tensor) -> tuple[Tensor, list[float]]:
    """Bins (M, DIRECTIONS) along the first principal directions, and their shares of the variance."""
    if not len(rows):
        return torch.empty(0, DIRECTIONS, dtype=torch.int64), [0.0] * DIRECTIONS
    mean, basis, variance = principal_directions(store.decode(evenly(rows, PRINCIPAL_TOKENS)))
    places = torch.cat([(store.decode(part).double() - mean) @ basis.T for part in rows.split(BLOCK_ROWS)])
    ranks = places.argsort(0).argsort(0)
    return ranks * BINS // len(rows), variance
