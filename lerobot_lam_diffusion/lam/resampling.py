"""Separable resizing with weights of our own: the same numbers on every device and for every batch shape.

Each output row or column is a short weighted sum of input ones, added up in a fixed order, one rounded
product and one rounded sum at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Taps(NamedTuple):
    """One axis: `out[o] = sum over k of weights[k, o] · in[sources[k, o]]`, both `(taps, out)`."""

    sources: Tensor
    weights: Tensor


def taps_of(sources: list[tuple[int, list]], dtype: torch.dtype) -> Taps:
    """Taps from the first source and the weights of each output; the unused ones get weight 0."""
    length = max(len(weights) for _, weights in sources)
    places = torch.tensor([[min(k, len(w) - 1) + lo for lo, w in sources] for k in range(length)])
    weights = torch.tensor(
        [[w[k] if k < len(w) else 0 for _, w in sources] for k in range(length)], dtype=dtype
    )
    return Taps(places, weights)


def weighted_sum(frames: Tensor, axis: int, taps: Taps) -> Tensor:
    """Resize one axis (-1 or -2) of frames, in the weights' dtype."""
    places, weights = (part.to(frames.device) for part in taps)
    if axis == -2:
        weights = weights.unsqueeze(-1)
    total: Tensor | None = None
    for rows, factor in zip(places, weights, strict=True):
        part = frames.index_select(axis, rows).to(weights.dtype) * factor
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def frame_by_frame(frames: Tensor, size: int, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `resize` to uint8 frames (..., 3, H, W) that are not of `size` × `size` yet."""
    if frames.shape[-2:] == (size, size):
        return frames
    flat = frames.reshape(-1, *frames.shape[-3:])
    # On a CPU frame by frame: each one's numbers stay in the cache.
    parts = flat.split(1) if frames.device.type == "cpu" else flat.split(64)
    resized = [resize(part) for part in parts if len(part)]
    if not resized:
        return frames.new_empty(*frames.shape[:-2], size, size)
    return torch.cat(resized).reshape(*frames.shape[:-2], size, size)
