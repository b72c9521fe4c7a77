"""Vector quantisation: each slot of a token → the nearest row of one shared codebook, always in float32."""

from typing import Any

from torch import Tensor, nn

TIE = 1e-4


class Quantizer(nn.Module):
    """The codebook; its state dict is `vq.*` of a model folder.

    Args:
        config: A LAM's config: `n_codes` rows K of width `action_latent_dim` a.
    """

    def __init__(self, config: Any):
        super().__init__()
        K = config.n_codes
        self.embedding = nn.Embedding(K, config.action_latent_dim)
        if not self.embedding.weight.is_meta:
            nn.init.uniform_(self.embedding.weight, -1 / K, 1 / K)

    def indices(self, tokens: Tensor) -> Tensor:
        """Nearest rows by squared distance, the first one on ties: (..., n·a) → int64 (..., n)."""
        return self._distances(tokens).argmin(dim=-1)

    def nearly_tied(self, tokens: Tensor) -> Tensor:
        """Slots that rounding could push to another row: (..., n·a) → bool (..., n).

        A slot counts if its distance to the plane between its two nearest rows is below `TIE` times its
        length. Kernels for another batch shape move a float32 token by 1e-6 of its length, or 5e-5 with an
        ill-conditioned LAM.
        """
        codebook = self.embedding.weight.float()
        distances = self._distances(tokens)  # (..., n, K)
        if len(codebook) < 2:
            return distances[..., 0].isnan()
        nearest, rows = distances.topk(2, dim=-1, largest=False)
        margin = nearest[..., 1] - nearest[..., 0]
        apart = (codebook[rows[..., 0]] - codebook[rows[..., 1]]).norm(dim=-1)
        length = tokens.float().unflatten(-1, (-1, codebook.shape[1])).norm(dim=-1)
        rounding = 1e-6 * length.square()  # of the distances themselves
        return (margin < 2 * TIE * length * apart + rounding) & (apart > 0)

    def rows(self, indices: Tensor) -> Tensor:
        """Exact codebook rows, flattened slot by slot: int64 (..., n) → float32 (..., n·a)."""
        return self.embedding.weight.float()[indices].flatten(-2)

    def _distances(self, tokens: Tensor) -> Tensor:
        """Squared distances to all rows: (..., n·a) → (..., n, K)."""
        codebook = self.embedding.weight.float()
        z = tokens.float().unflatten(-1, (-1, codebook.shape[1]))  # (..., n, a)
        return z.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2 * z @ codebook.T
