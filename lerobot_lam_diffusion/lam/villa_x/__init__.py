"""villa-X's latent action model (and IGOR's, whose architecture it is)."""

from .config import LamConfig
from .decoder import Decoder
from .encoder import Encoder
from .model import VillaXLam

__all__ = ["Decoder", "Encoder", "LamConfig", "VillaXLam"]
