"""The forward dynamics model (FDM): a frame and a latent action → the next frame."""

import torch
from torch import Tensor, nn

from .config import LamConfig
from .layers import Attention, PatchEmbed, RMSNorm, SwishGLU, spatial_table


class Decoder(nn.Module):
    """Transformer over one action token and the frame's patches; its state dict is `decoder.*`."""

    def __init__(self, config: LamConfig):
        super().__init__()
        X = config.decoder_embed_dim
        self.patch_size, self.in_channels = config.patch_size, config.in_channels
        self.pe = nn.Parameter(spatial_table(config.grid_size, X), requires_grad=False)
        self.embed = PatchEmbed(config.patch_size, X)
        self.action_embed = nn.Linear(config.token_dim, X)
        self.layers = nn.ModuleList([DecoderBlock(config) for _ in range(config.decoder_depth)])
        self.norm = RMSNorm(X)
        self.pred_head = nn.Linear(X, config.patch_size**2 * config.in_channels)

    def forward(self, frames: Tensor, latents: Tensor) -> Tensor:
        """Predict the patches of the next frame.

        Args:
            frames: (B, 3, R, R), normalised.
            latents: (B, n·a).

        Returns:
            (B, N, P·P·C) in the normalised scale; inside a patch the order is row, column, colour.
        """
        x = self.embed(frames) + self.pe
        x = torch.cat([self.action_embed(latents).unsqueeze(1), x], dim=1)  # (B, 1+N, X)
        for layer in self.layers:
            x = layer(x)
        return self.pred_head(self.norm(x)[:, 1:])

    def unpatch(self, patches: Tensor) -> Tensor:
        """(B, N, P·P·C) → (B, C, R, R)."""
        B, N, _ = patches.shape
        G, P, C = round(N**0.5), self.patch_size, self.in_channels
        grid = patches.view(B, G, G, P, P, C)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(B, C, G * P, G * P)


class DecoderBlock(nn.Module):
    """Pre-norm attention and gated MLP, each with a learned elementwise scale."""

    def __init__(self, config: LamConfig):
        super().__init__()
        X = config.decoder_embed_dim
        hidden = int(X * config.mlp_ratio)
        self.pre_norm_attn = RMSNorm(X)
        self.attn = Attention(X, config.decoder_n_heads, config.use_qk_norm)
        self.layer_scale_attn = LayerScale(X)
        self.pre_norm_mlp = RMSNorm(X)
        # The original has a parameter-free dropout between the two, hence the keys mlp.0 and mlp.2.
        self.mlp = nn.Sequential(SwishGLU(X, hidden), nn.Identity(), nn.Linear(hidden, X))
        self.layer_scale_mlp = LayerScale(X)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre_norm_attn(x)
        x = x + self.layer_scale_attn(self.attn(y, y))
        return x + self.layer_scale_mlp(self.mlp(self.pre_norm_mlp(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
