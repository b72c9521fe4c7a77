"""Vector quantisation: each slot of a token → the nearest row of one shared codebook, always in float32."""

from torch import Tensor, nn

from .config import LamConfig


class Quantizer(nn.Module):
    """The codebook; its state dict is `vq.*` of a checkpoint."""

    def __init__(self, config: LamConfig):
        super().__init__()
        K = config.n_codes
        self.embedding = nn.Embedding(K, config.action_latent_dim)
        if not self.embedding.weight.is_meta:
            nn.init.uniform_(self.embedding.weight, -1 / K, 1 / K)

    def indices(self, tokens: Tensor) -> Tensor:
        """Nearest rows by squared distance, the first one on ties: (..., n·a) → int64 (..., n)."""
        codebook = self.embedding.weight.float()
        z = tokens.float().unflatten(-1, (-1, codebook.shape[1]))  # (..., n, a)
        distances = z.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2 * z @ codebook.T
        return distances.argmin(dim=-1)

    def rows(self, indices: Tensor) -> Tensor:
        """Exact codebook rows, flattened slot by slot: int64 (..., n) → float32 (..., n·a)."""
        return self.embedding.weight.float()[indices].flatten(-2)
