"""Multi-head attention as the families share it; a head is a contiguous group of channels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, h·e) → (B, h, S, e)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Softmax attention with scale 1/√e, no dropout.

    Args:
        q, k, v: (B, h, S, e); S of q may differ from that of k and v.
        causal: position s sees positions 0..s only.

    Returns:
        (B, S, h·e), heads side by side.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def attend_pair(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over two positions, written out to avoid B·N·h tiny softmaxes.

    The first position sees only itself, so its output is its value; the second weighs two values.

    Args:
        q: (B, N, h, e), of the second position.
        k, v: (B, 2, N, h, e).

    Returns:
        (B, 2, N, h·e).
    """
    advantage = (q * (k[:, 1] - k[:, 0])).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    earlier, later = v.unbind(1)
    mixed = torch.lerp(earlier, later, torch.sigmoid(advantage))
    return torch.stack([earlier, mixed], dim=1).flatten(-2)
