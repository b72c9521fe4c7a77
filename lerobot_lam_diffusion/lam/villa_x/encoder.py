"""The inverse dynamics model (IDM): a window of frames → one group of learned tokens per frame pair."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend, attend_pair, split_heads
from .config import LamConfig
from .layers import Attention, PatchEmbed, RMSNorm, SwishGLU, head_norm, spatial_table, temporal_table


class Encoder(nn.Module):
    """Spatio-temporal transformer with a pooling block; its state dict is `encoder.*` of a checkpoint."""

    def __init__(self, config: LamConfig):
        super().__init__()
        D = config.encoder_embed_dim
        spatial, temporal = spatial_table(config.grid_size, D), temporal_table(config.d_t, D)
        self.pe_spatial = nn.Parameter(spatial, requires_grad=False)
        self.pe_temporal = nn.Parameter(temporal, requires_grad=False)
        self.embed = PatchEmbed(config.patch_size, D)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.encoder_depth)])
        self.norm = RMSNorm(D)
        self.map_block = PoolingBlock(config)

    def forward(self, frames: Tensor) -> Tensor:
        """Encode one window per batch row.

        Args:
            frames: (B, T, 3, R, R), normalised, 2 ≤ T ≤ d_t.

        Returns:
            (B, T-1, n·a): continuous tokens of the pairs (t, t+1), slot 0's `a` numbers first. Token t sees
            frames 0..t+1 of the window, never later ones.
        """
        B, T = frames.shape[:2]
        x = self.embed(frames.flatten(0, 1)) + self.pe_spatial  # (B·T, N, D)
        x = x.unflatten(0, (B, T))
        for index, layer in enumerate(self.layers):
            x = layer(x, self.pe_temporal[:, :T, None] if index == 0 else None)
        y = self.norm(x)
        pairs = (y[:, :-1] + y[:, 1:]) / 2  # (B, T-1, N, D)
        tokens = self.map_block(pairs.flatten(0, 1))  # (B·(T-1), n, a)
        return tokens.flatten(1).unflatten(0, (B, T - 1))


class Block(nn.Module):
    """Attention within each frame, causal attention along time at each patch, MLP; learned modulation.

    Both attentions share one gate; the temporal one has neither norm nor modulation.
    """

    def __init__(self, config: LamConfig):
        super().__init__()
        D, heads = config.encoder_embed_dim, config.encoder_n_heads
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)
        self.attn = SelfAttention(D, heads, config.st_use_qk_norm)
        self.attn_temp = TemporalAttention(D, heads, config.st_use_qk_norm)
        self.mlp = Mlp(D, int(D * config.mlp_ratio))

    def forward(self, x: Tensor, time_table: Tensor | None) -> Tensor:
        """x (B, T, N, D) → same shape. `time_table` (1, T, 1, D) is added to the temporal input if given."""
        B, T = x.shape[:2]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift_table
        spatial = self.attn(_plain_norm(x, scale1, shift1).flatten(0, 1)).unflatten(0, (B, T))
        x = x + gate1 * spatial
        u = x if time_table is None else x + time_table
        x = x + gate1 * self.attn_temp(u)
        return x + gate2 * self.mlp(_plain_norm(x, scale2, shift2))


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused projection: queries, keys, values in that order."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = head_norm(width // heads, qk_norm)
        self.k_norm = head_norm(width // heads, qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        return self._attend(x)

    def _attend(self, x: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v, causal))


class TemporalAttention(SelfAttention):
    """Causal attention of every patch position over the window's frames."""

    def forward(self, u: Tensor) -> Tensor:
        """(B, T, N, D) → (B, T, N, D)."""
        if u.shape[1] == 2:
            return self._pair(u)
        sequences = u.transpose(1, 2).flatten(0, 1)  # (B·N, T, D)
        return self._attend(sequences, causal=True).unflatten(0, (len(u), -1)).transpose(1, 2)

    def _pair(self, u: Tensor) -> Tensor:
        """T = 2: a third off the compact LAM's time on a CPU. The first position needs no query."""
        D = u.shape[-1]
        k, v = F.linear(u, self.qkv.weight[D:], self.qkv.bias[D:]).chunk(2, dim=-1)  # (B, 2, N, D)
        q = F.linear(u[:, 1], self.qkv.weight[:D], self.qkv.bias[:D])  # (B, N, D)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        return self.proj(attend_pair(self.q_norm(q), self.k_norm(k), v))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PoolingBlock(nn.Module):
    """Learned queries attend to a pair's patch features; post-norm; (P, N, D) → (P, n, a)."""

    def __init__(self, config: LamConfig):
        super().__init__()
        D = config.encoder_embed_dim
        hidden = int(D * config.mlp_ratio)
        self.latents = nn.Parameter(0.02 * torch.randn(config.num_learned_tokens, D))
        self.pre_projection = nn.Linear(D, D)
        self.attn = Attention(D, config.map_heads, qk_norm=False)
        self.attn_norm = RMSNorm(D)
        self.mlp_norm = RMSNorm(D)
        self.mlp = nn.Sequential(SwishGLU(D, hidden), nn.Linear(hidden, D))
        self.final_proj = nn.Sequential(nn.Linear(D, config.action_latent_dim))

    def forward(self, features: Tensor) -> Tensor:
        latents = self.latents.expand(features.shape[0], -1, -1)  # (P, n, D)
        z = self.attn_norm(latents + self.attn(latents, self.pre_projection(features)))
        z = self.mlp_norm(z + self.mlp(z))
        return self.final_proj(z)


def _plain_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without gain or bias, then the block's learned scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
