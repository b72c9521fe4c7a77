"""Frames as LeRobot or a camera delivers them → uint8 and normalised frames, and back."""

import torch
from torch import Tensor

from lerobot_lam_diffusion.utils.errors import LamError

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def standardize(frames: Tensor) -> Tensor:
    """uint8 (..., 3, R, R) → float32, ImageNet-normalised per channel."""
    mean, std = _statistics(frames.device)
    return frames.float().div_(255).sub_(mean).div_(std)  # in place: no three copies


def denormalize_frames(frames: Tensor) -> Tensor:
    """Inverse of `standardize`: float (..., 3, R, R) → uint8, clamped to 0..255 and truncated."""
    mean, std = _statistics(frames.device)
    return ((frames.float() * std + mean) * 255).clamp(0, 255).to(torch.uint8)


def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(_STD, device=device).view(3, 1, 1)
    return mean, std


def check_frames(frames: Tensor) -> None:
    """Raise a LamError unless `frames` is uint8 (..., 3, H, W)."""
    if frames.dtype != torch.uint8:
        raise LamError(
            f"The frames are {frames.dtype}, expected torch.uint8 on the 0..255 scale. "
            "Convert 0..1 floats that came from 8-bit images with (255 * x).round().to(torch.uint8)."
        )
    if frames.ndim < 3 or frames.shape[-3] != 3 or 0 in frames.shape[-2:]:
        raise LamError(
            f"The frames have shape {tuple(frames.shape)}, expected channels-first RGB (..., 3, H, W). "
            "Move the channel axis of channels-last images with x.movedim(-1, -3)."
        )


def as_uint8(frames: Tensor) -> Tensor:
    """Frames on the scale that a LAM takes: uint8 unchanged, floats in 0..1 as round(255 x).

    LeRobot delivers 8-bit images as floats in 0..1; this restores the camera's own values.
    """
    if frames.dtype == torch.uint8:
        return frames
    return (frames.float() * 255).round().clamp(0, 255).to(torch.uint8)
