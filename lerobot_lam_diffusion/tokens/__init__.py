"""Store → batch: the token store, its provenance, and the one join of tokens to frames."""

from lerobot_lam_diffusion.tokens.dataset import LamTokenDataset
from lerobot_lam_diffusion.tokens.provenance import Provenance
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import TokenStoreError

__all__ = ["LamTokenDataset", "Provenance", "TokenStore", "TokenStoreError"]
