"""UniVLA's latent action model, stage 2 (task-centric)."""

from .model import UniVlaLam
from .network import UniVlaConfig

__all__ = ["UniVlaConfig", "UniVlaLam"]
