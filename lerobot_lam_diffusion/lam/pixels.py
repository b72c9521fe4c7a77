"""A 64-bit digest of the pixels of a frame pair, cheap on any device."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_MIX = 0x5851F42D4C957F2D  # odd: no word is lost


def pixel_digests(prev: Tensor, cur: Tensor) -> Tensor:
    """A digest of each frame pair, int64 `(P,)`, the same on every device.

    A sum of 64-bit words, each mixed and multiplied by an odd factor of its own, modulo 2^64. One changed
    word always changes it; the collision probability of several is about 2^-64. Not cryptographic.

    Args:
        prev, cur: uint8 `(P, 3, H, W)`.
    """
    words = [_words(frames) for frames in (prev, cur)]
    height, width = prev.shape[-2:]
    factors = _factors(2 * words[0].shape[1] + 1, prev.device)
    sums = [
        (part * chosen).sum(1)
        for part, chosen in zip(words, factors[1:].split(words[0].shape[1]), strict=True)
    ]
    return sums[0] + sums[1] + factors[0] * (height << 32 | width)


def _words(frames: Tensor) -> Tensor:
    """The bytes of each frame, zeros added, as int64; mixed, so that high bytes reach low ones."""
    flat = frames.flatten(1)
    words = F.pad(flat, (0, -flat.shape[1] % 8)).contiguous().view(torch.int64) * _MIX
    return words ^ ((words >> 32) & 0xFFFFFFFF)


@functools.lru_cache(maxsize=8)
def _factors(count: int, device: torch.device) -> Tensor:
    """Fixed odd numbers without a pattern: splitmix64 of 1, 2, 3, …"""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = (state ^ (state >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(state.view(np.int64)).to(device)
