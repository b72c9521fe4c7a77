"""Latent action models: pixels → tokens. Knows nothing of LeRobot's datasets and policies.

lam = load_lam("pusht-compact")  # or a folder, or a Hub id such as "microsoft/villa-x"
tokens = lam.encode_pairs(prev, cur)  # uint8 (B, 3, H, W) each
tokens.quantized  # (B, n·a)
"""

from lerobot_lam_diffusion.utils.errors import LamError

from .base import LamTokens, LatentActionModel, proposed_stride
from .config import TokenConfig
from .loading import fingerprint_of, load_lam, read_config, register_lam, save_lam, write_lam
from .locating import recorded_path, resolve_lam, shipped_lams
from .villa_x.config import LamConfig

__all__ = [
    "LamConfig",
    "LamError",
    "LamTokens",
    "LatentActionModel",
    "TokenConfig",
    "fingerprint_of",
    "load_lam",
    "proposed_stride",
    "read_config",
    "recorded_path",
    "register_lam",
    "resolve_lam",
    "save_lam",
    "shipped_lams",
    "write_lam",
]
