"""Pieces that the encoder and the decoder share. Attribute names follow the checkpoint's keys."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend, split_heads


class RMSNorm(nn.Module):
    """x / max(rms(x), 1e-8) · g over the last axis; an all-zero row stays zero.

    The floor is a clamp on the RMS itself and the gain is `g`, not `1 + g`.
    """

    def __init__(self, width: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        rms = wide.norm(dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
        return (wide / rms.clamp(min=1e-8)).to(x.dtype) * self.g


class SwishGLU(nn.Module):
    """Linear to twice the width; its first half gated by the SiLU of its second half."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.project = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.project(x).chunk(2, dim=-1)
        return value * F.silu(gate)


class PatchEmbed(nn.Module):
    """Frames (B, 3, R, R) → patch features (B, N, width), patches in row-major order."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, frames: Tensor) -> Tensor:
        return self.proj(frames).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of queries to features; `kv` holds keys, then values."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_layernorm = head_norm(width // heads, qk_norm)
        self.k_layernorm = head_norm(width // heads, qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """queries (B, S, D), features (B, N, D) → (B, S, D)."""
        q = split_heads(self.q(queries), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.kv(features).chunk(2, dim=-1))
        return self.proj(attend(self.q_layernorm(q), self.k_layernorm(k), v))


def head_norm(width: int, enabled: bool) -> nn.Module:
    """LayerNorm of one head's queries or keys, shared by all heads; without it nothing, and no keys."""
    return nn.LayerNorm(width, eps=1e-5) if enabled else nn.Identity()


# Sine-cosine position tables of a fresh model; a checkpoint's stored ones take their place.


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
