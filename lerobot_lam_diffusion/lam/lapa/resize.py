"""Pillow's 8-bit bilinear resize in integers, width first, whatever Pillow is installed.

Pillow 13 orders the two passes differently for some sizes; upstream labelled its data with earlier ones.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..resampling import Taps, frame_by_frame, taps_of, weighted_sum

PRECISION_BITS = 22


def resize(frames: Tensor, size: int) -> Tensor:
    """uint8 (..., 3, H, W) → uint8 (..., 3, size, size): antialiased bilinear, aspect ratio not kept."""
    return frame_by_frame(frames, size, lambda part: _pass(_pass(part, -1, size), -2, size))


def _pass(frames: Tensor, axis: int, size: int) -> Tensor:
    """One axis; rounded to 8 bits, so the next one starts from whole levels."""
    if frames.shape[axis] == size:
        return frames
    total = weighted_sum(frames, axis, _taps(frames.shape[axis], size))
    return total.add_(1 << (PRECISION_BITS - 1)).bitwise_right_shift_(PRECISION_BITS).clamp_(0, 255).byte()


@lru_cache(maxsize=32)
def _taps(length: int, size: int) -> Taps:
    """Triangles as wide as a destination pixel, in units of 2^-22. The sums stay below 2^31."""
    scale = length / size
    support = max(scale, 1.0)
    sources = []
    for place in range(size):
        centre = (place + 0.5) * scale
        first = max(0, int(centre - support + 0.5))
        last = min(length, int(centre + support + 0.5))
        weights = [max(0.0, 1 - abs((i - centre + 0.5) / support)) for i in range(first, last)]
        total = sum(weights)
        sources.append((first, [int(0.5 + w / total * (1 << PRECISION_BITS)) for w in weights]))
    return taps_of(sources, torch.int32)
