"""UniVLA's latent action model, stage 2 (task-centric)."""

from .config import UniVlaConfig
from .model import UniVlaLam

__all__ = ["UniVlaConfig", "UniVlaLam"]
