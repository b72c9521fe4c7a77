"""How the moving pixels move: what tokens are tied to where the data have no state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import moving_pixels

_SCALES = (1, 2, 4)
"""Downsampling factors: a coarse scale sees fast motion, a fine one slow motion."""
_DAMPING = 0.01
"""Tikhonov term, as a share of the image's squared gradient: keeps flicker from producing large shifts."""


def mean_flow(prev: Tensor, cur: Tensor) -> Tensor:
    """The one shift that best explains how brightness changes at the moving pixels, at three scales.

    Damped least squares over the whole image, as Lucas and Kanade (1981) do over a window.

    Args:
        prev, cur: uint8 (B, 3, R, R) each.

    Returns:
        float32 (B, 6): x and y at each scale, in pixels of that scale; 0 if nothing moves.
    """
    moving = moving_pixels(prev, cur).float().unsqueeze(1)
    before, after = (frames.float().mean(1, keepdim=True) for frames in (prev, cur))
    return torch.cat(
        [_shift(*(F.avg_pool2d(each, scale) for each in (before, after, moving))) for scale in _SCALES], dim=1
    )


def _shift(before: Tensor, after: Tensor, weight: Tensor) -> Tensor:
    """(B, 1, H, W) each → (B, 2)."""
    before, after = _blurred(before), _blurred(after)
    y, x = torch.gradient((before + after) / 2, dim=(2, 3))
    change = before - after
    xx, xy, yy, xc, yc = (
        (weight * each).sum((1, 2, 3)) for each in (x * x, x * y, y * y, x * change, y * change)
    )
    damping = _DAMPING * (x * x + y * y).sum((1, 2, 3)) / 2 + 1e-6
    xx, yy = xx + damping, yy + damping
    return torch.stack([yy * xc - xy * yc, xx * yc - xy * xc], dim=1) / (xx * yy - xy * xy).unsqueeze(1)


def _blurred(images: Tensor) -> Tensor:
    for _ in range(2):
        images = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return images
