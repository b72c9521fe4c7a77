"""Pieces that the encoder and the decoder share. Attribute names follow the checkpoint's keys."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Softmax attention with scale 1/√(head width), no dropout.

    Args:
        q, k, v: (B, h, S, e), each with its own S as attention allows.
        causal: position s sees positions 0..s only.

    Returns:
        (B, S, h·e), heads side by side.
    """
    return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, h·e) → (B, h, S, e); a head is a contiguous group of channels."""
    B, S, D = x.shape
    return x.view(B, S, heads, D // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, h, S, e) → (B, S, h·e)."""
    B, h, S, e = x.shape
    return x.transpose(1, 2).reshape(B, S, h * e)


def head_norm(width: int, enabled: bool) -> nn.Module:
    """LayerNorm of one head's queries or keys, shared by all heads; without it nothing, and no keys."""
    return nn.LayerNorm(width, eps=1e-5) if enabled else nn.Identity()
