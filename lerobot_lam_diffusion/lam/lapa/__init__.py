"""LAPA's latent action quantiser (LAQ)."""

from .config import LapaConfig
from .model import LapaLam

__all__ = ["LapaConfig", "LapaLam"]
