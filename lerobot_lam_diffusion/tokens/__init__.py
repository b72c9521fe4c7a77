"""Store → batch: the token store, its provenance, and the one join of tokens to frames."""

from lerobot_lam_diffusion.tokens.dataset import LamTokenDataset
from lerobot_lam_diffusion.tokens.layout import TokenStoreError
from lerobot_lam_diffusion.tokens.provenance import Provenance
from lerobot_lam_diffusion.tokens.store import TokenStore

__all__ = ["LamTokenDataset", "Provenance", "TokenStore", "TokenStoreError"]
