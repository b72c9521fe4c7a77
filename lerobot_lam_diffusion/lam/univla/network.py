"""UniVLA's encoder: spatio-temporal blocks over a pair's DINOv2 features, with latent rows prepended.

The modules follow the specification of the published weights, not their keys: `convert.py` translates those.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend, attend_pair, split_heads
from ..quantizer import Quantizer
from .config import UniVlaConfig
from .dino import Dino


class UniVlaEncoder(nn.Module):
    """A pair of frames → the task-centric slots' vectors; its state dict is `encoder.*`."""

    def __init__(self, config: UniVlaConfig):
        super().__init__()
        d, D = config.dino_dim, config.model_dim
        self.num_slots = config.num_learned_tokens
        self.dino = Dino(config)
        self.latents = nn.Parameter(torch.empty(config.num_latents, d))
        self.input = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, D), nn.LayerNorm(D))
        # Sines and cosines of the position in the sequence, computed once, at conversion.
        self.positions = nn.Parameter(torch.empty(config.num_latents + config.num_patches, D))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.enc_blocks)])
        self.to_token = nn.Linear(D, config.action_latent_dim)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, 2, 3, R, R), normalised → (B, n·a), slot 0's `a` numbers first."""
        return self.to_token(self.later_latents(clip)[:, : self.num_slots]).flatten(1)

    def later_latents(self, clip: Tensor) -> Tensor:
        """The later frame's latent rows after the last block: (B, 2, 3, R, R) → (B, 2n, D)."""
        B = len(clip)
        features = self.dino(clip.flatten(0, 1))  # (B·2, N, d)
        latents = self.latents.expand(len(features), -1, -1)
        x = self.input(torch.cat([latents, features], dim=1)).unflatten(0, (B, 2))  # (B, 2, S, D)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return x[:, 1, : len(self.latents)]


class Block(nn.Module):
    """Attention within each frame, causal attention over the two frames of each position, MLP; pre-norm."""

    def __init__(self, config: UniVlaConfig):
        super().__init__()
        D = config.model_dim
        self.norm1 = nn.LayerNorm(D)
        self.spatial = SpatialAttention(D, config.num_heads)
        self.norm2 = nn.LayerNorm(D)
        self.temporal = TemporalAttention(D, config.num_heads)
        self.norm3 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, S, D) → same shape."""
        x = x + self.spatial(self.norm1(x))
        x = x + self.temporal(self.norm2(x))
        return x + self.mlp(self.norm3(x))


class SpatialAttention(nn.Module):
    """Multi-head self-attention over the positions of each frame."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, S, D) → same shape."""
        flat = x.flatten(0, 1)
        q, k, v = (split_heads(part(flat), self.heads) for part in (self.q, self.k, self.v))
        return self.out(attend(q, k, v)).view(x.shape)


class TemporalAttention(SpatialAttention):
    """Causal attention of every position over the two frames."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, S, D) → same shape."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (self.q(x[:, 1]), self.k(x), self.v(x)))
        return self.out(attend_pair(q, k, v))


class Irrelevant(nn.Module):
    """The task-irrelevant slots' projection and codebook; they are no part of a token."""

    def __init__(self, config: UniVlaConfig):
        super().__init__()
        self.proj = nn.Linear(config.model_dim, config.action_latent_dim)
        self.vq = Quantizer(replace(config, n_codes=config.irrelevant_codes))


def position_table(length: int, width: int) -> Tensor:
    """Interleaved sines and cosines of the positions 0 .. length-1, float32 (length, width)."""
    step = torch.tensor(-torch.log(torch.tensor(10000.0, dtype=torch.float64)).item() / width)
    frequencies = torch.exp(torch.arange(0, width, 2).float() * step)
    angles = torch.arange(length).float().unsqueeze(1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def interpolated_positions(table: Tensor, grid_size: int) -> Tensor:
    """DINOv2's position table (1, 1 + M·M, d) for G × G patches, (1, 1 + G·G, d), float32."""
    table = table.float()
    side = round((table.shape[1] - 1) ** 0.5)
    if side == grid_size:
        return table
    grid = table[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)  # (1, d, M, M)
    size = (grid_size, grid_size)
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
