"""LAPA's latent action quantiser (LAQ)."""

from .model import LapaLam
from .network import LapaConfig

__all__ = ["LapaConfig", "LapaLam"]
