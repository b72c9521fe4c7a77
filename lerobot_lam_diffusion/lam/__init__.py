"""Latent action models: pixels → tokens. Knows nothing of LeRobot's datasets and policies.

lam = load_lam("pusht-compact")  # or a folder, or a Hub id such as "microsoft/villa-x"
tokens = lam.encode_pairs(prev, cur)  # uint8 (B, 3, H, W) each
tokens.quantized  # (B, n·a)
"""

from .config import LamConfig
from .errors import LamError
from .fingerprint import fingerprint_of
from .loading import load_lam, save_lam
from .locating import resolve_lam, shipped_lams
from .villa_x import LamTokens, LatentActionModel

__all__ = [
    "LamConfig",
    "LamError",
    "LamTokens",
    "LatentActionModel",
    "fingerprint_of",
    "load_lam",
    "resolve_lam",
    "save_lam",
    "shipped_lams",
]
