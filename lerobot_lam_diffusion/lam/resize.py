"""Resize frames to squares: each LAM needs the resize it was trained with, bit for bit, on every device.

`bilinear` is torch's own. The other two are separable resizes with our own weights: each output row or column
is a short weighted sum of input rows or columns, accumulated in a fixed order, one rounded product and one
rounded sum at a time. They therefore do not depend on installed libraries, the device or the batch shape.

All three map uint8 (..., 3, H, W) to uint8 (..., 3, size, size) without keeping the aspect ratio, and return
frames that already have that size unchanged.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def bilinear(frames: Tensor, size: int) -> Tensor:
    """Antialiased bilinear, computed in float32, rounded half to even.

    In float32 on purpose: a native uint8 kernel is off by one level on some 14 % of the pixels.
    """

    def resize(part: Tensor) -> Tensor:
        wide = F.interpolate(part.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
        return wide.round_().to(torch.uint8)

    return _frame_by_frame(frames, size, resize)


def pillow_bilinear(frames: Tensor, size: int) -> Tensor:
    """Pillow's antialiased 8-bit bilinear in integers, width first.

    Pillow 13 orders the two passes differently for some sizes; LAPA's data were labelled with earlier ones.
    """

    def one_axis(part: Tensor, axis: int) -> Tensor:
        length = part.shape[axis]
        if length == size:
            return part
        total = _weighted_sum(part, axis, _pillow_taps(length, size))
        # Rounded to 8 bits, so the second axis starts from whole levels.
        return total.add_(1 << (_PILLOW_BITS - 1)).bitwise_right_shift_(_PILLOW_BITS).clamp_(0, 255).byte()

    return _frame_by_frame(frames, size, lambda part: one_axis(one_axis(part, -1), -2))


def tensorflow_lanczos3(frames: Tensor, size: int) -> Tensor:
    """TensorFlow's antialiased Lanczos-3 in float32, rounded half to even."""

    def resize(part: Tensor) -> Tensor:
        rows = _weighted_sum(part, -2, _lanczos_taps(part.shape[-2], size))
        columns = _weighted_sum(rows, -1, _lanczos_taps(part.shape[-1], size))
        return columns.round_().clamp_(0, 255).byte()

    return _frame_by_frame(frames, size, resize)


def _frame_by_frame(frames: Tensor, size: int, resize: Callable[[Tensor], Tensor]) -> Tensor:
    if frames.shape[-2:] == (size, size):
        return frames
    flat = frames.reshape(-1, *frames.shape[-3:])
    # On a CPU frame by frame: each one's values stay in the cache (2 x as fast at 480 × 640).
    parts = flat.split(1) if frames.device.type == "cpu" else flat.split(64)
    resized = [resize(part) for part in parts if len(part)]
    if not resized:
        return frames.new_empty(*frames.shape[:-2], size, size)
    return torch.cat(resized).reshape(*frames.shape[:-2], size, size)


class _Taps(NamedTuple):
    """One axis: `out[o] = sum over k of weights[k, o] · in[sources[k, o]]`, both `(taps, out)`."""

    sources: Tensor
    weights: Tensor


def _weighted_sum(frames: Tensor, axis: int, taps: _Taps) -> Tensor:
    """Resize one axis (-1 or -2), in the weights' dtype."""
    sources, weights = (part.to(frames.device) for part in taps)
    if axis == -2:
        weights = weights.unsqueeze(-1)
    parts = (
        frames.index_select(axis, rows).to(weights.dtype) * factor
        for rows, factor in zip(sources, weights, strict=True)
    )
    total = next(parts)
    for part in parts:
        total.add_(part)
    return total


def _taps(windows: list[tuple[int, list]], dtype: torch.dtype) -> _Taps:
    """Taps from the first source and the weights of each output; unused taps get weight 0."""
    length = max(len(weights) for _, weights in windows)
    sources = torch.tensor([[min(k, len(w) - 1) + first for first, w in windows] for k in range(length)])
    weights = [[w[k] if k < len(w) else 0 for _, w in windows] for k in range(length)]
    return _Taps(sources, torch.tensor(weights, dtype=dtype))


_PILLOW_BITS = 22


@lru_cache(maxsize=32)
def _pillow_taps(length: int, size: int) -> _Taps:
    """Triangles as wide as a destination pixel, in units of 2^-22. The sums stay below 2^31."""
    scale = length / size
    support = max(scale, 1.0)
    windows = []
    for place in range(size):
        centre = (place + 0.5) * scale
        first = max(0, int(centre - support + 0.5))
        last = min(length, int(centre + support + 0.5))
        weights = [max(0.0, 1 - abs((i - centre + 0.5) / support)) for i in range(first, last)]
        total = sum(weights)
        windows.append((first, [int(0.5 + w / total * (1 << _PILLOW_BITS)) for w in weights]))
    return _taps(windows, torch.int32)


_RADIUS = np.float32(3.0)
_PI = np.float32(3.14159265359)


@lru_cache(maxsize=32)
def _lanczos_taps(length: int, size: int) -> _Taps:
    """Computed in float32 at each step, as in TensorFlow: with float64 one pixel in 1,700 is a level off."""
    one, half = np.float32(1), np.float32(0.5)
    scale = one / (np.float32(size) / np.float32(length))
    stretch = max(scale, one)
    windows = []
    for place in range(size):
        centre = (np.float32(place) + half) * scale
        first = max(0, int(np.ceil(centre - _RADIUS * stretch - half)))
        last = min(length - 1, int(np.floor(centre + _RADIUS * stretch - half)))
        places = np.arange(first, last + 1, dtype=np.float32)
        weights = _lanczos(np.abs((places + half - centre) * (one / stretch)))
        total = np.float32(0)
        for weight in weights:
            total += weight
        windows.append((first, (weights / total).tolist()))
    return _taps(windows, torch.float32)


def _lanczos(t: np.ndarray) -> np.ndarray:
    """The windowed sinc at distances t ≥ 0, float32."""
    safe = np.maximum(t, np.float32(1e-3))
    wave = _RADIUS * np.sin(_PI * safe) * np.sin(_PI * safe / _RADIUS) / (_PI * _PI * safe * safe)
    return np.where(t > _RADIUS, np.float32(0), np.where(t <= np.float32(1e-3), np.float32(1), wave))
