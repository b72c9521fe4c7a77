"""Sine-cosine position tables of a fresh villa-X model; a checkpoint's stored ones take their place."""

import torch
from torch import Tensor


def temporal_table(num_frames: int, width: int) -> Tensor:
    """Table of the frame's position in its window: float32 (1, num_frames, width)."""
    return _sincos(torch.arange(num_frames, dtype=torch.float64), width).float().unsqueeze(0)


def spatial_table(grid_size: int, width: int) -> Tensor:
    """Table of the patch's place, patches in row-major order: float32 (1, grid_size², width).

    The first half of the channels encodes the column, the second half the row.
    """
    places = torch.arange(grid_size, dtype=torch.float32)
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    halves = [_sincos(axis.reshape(-1), width // 2) for axis in (columns, rows)]
    return torch.cat(halves, dim=1).unsqueeze(0)


def _sincos(positions: Tensor, width: int) -> Tensor:
    """(P,) → (P, width): a block of sines, then a block of cosines; frequencies always in float32."""
    exponents = torch.arange(width // 2, dtype=torch.float32) / (width / 2)
    frequencies = 1.0 / 10000**exponents
    angles = positions[:, None] * frequencies[None, :].to(positions.dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
