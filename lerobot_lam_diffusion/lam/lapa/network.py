"""LAPA's dimensions and networks: patches of two frames → tokens, and a frame with a token → the later frame.

The modules follow the specification of the published weights, not their keys: `convert.py` translates those.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ConvertedConfig

LOGIT_SCALE = 8.0  # of normalised queries and keys, whatever the width of a head

HEADS: dict[int, tuple[tuple[int, int], tuple[tuple[int, int], int, int] | None]] = {
    1: ((3, 3), ((4, 4), 1, 0)),
    2: ((3, 3), ((3, 4), 1, 0)),
    4: ((3, 3), ((3, 3), 1, 0)),
    16: ((3, 3), ((3, 3), 2, 1)),
    64: ((3, 3), None),
    256: ((3, 3), None),
}
"""Tokens of a pair → first kernel (stride 2, padding 1); kernel, stride and padding of the second."""


def tokens_of_grid(code_seq_len: int, grid_size: int) -> int:
    """How many tokens the head `code_seq_len` makes of a grid of patches."""
    half = (grid_size - 1) // 2 + 1
    _, second = HEADS[code_seq_len]
    if second is None:
        return half**2
    kernel, stride, padding = second
    return prod(max(0, (half + 2 * padding - side) // stride + 1) for side in kernel)


@dataclass(frozen=True, kw_only=True)
class LapaConfig(ConvertedConfig):
    """Dimensions; the defaults are those of the published weights.

    Args:
        image_size: Side R of the square that frames are resized to, in pixels; a multiple of `patch_size`.
        patch_size: Side P of a patch, in pixels.
        dim: Width D of the transformers.
        spatial_depth: Blocks of the spatial encoder, and of the decoder.
        temporal_depth: Blocks of the temporal encoder.
        heads, dim_head: Attention heads and their width.
        ff_dim: Hidden width of the MLPs.
    """

    num_learned_tokens: int = 4
    action_latent_dim: int = 32
    n_codes: int = 8
    stride_seconds: float | None = 0.6
    image_size: int = 256
    patch_size: int = 32
    dim: int = 1024
    spatial_depth: int = 8
    temporal_depth: int = 8
    heads: int = 16
    dim_head: int = 64
    ff_dim: int = 2730

    def problems(self) -> list[str]:
        if problems := self.not_multiples(("image_size", "patch_size")):
            return problems
        if self.num_learned_tokens not in HEADS:
            return [f"code_seq_len is {self.num_learned_tokens}, expected one of {list(HEADS)}"]
        tokens = tokens_of_grid(self.num_learned_tokens, self.grid_size)
        if tokens != self.num_learned_tokens:
            return [
                f"code_seq_len is {self.num_learned_tokens}, but {self.grid_size} × {self.grid_size} patches "
                f"(image_size {self.image_size}, patch_size {self.patch_size}) give {tokens} tokens: set "
                "image_size and code_seq_len to those of the training"
            ]
        return []

    @property
    def grid_size(self) -> int:
        """Patches along one side, G."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    @property
    def patch_values(self) -> int:
        """Values in one patch, 3·P·P."""
        return 3 * self.patch_size**2


class LapaEncoder(nn.Module):
    """A pair of frames → the difference of their latents; its state dict is `encoder.*`."""

    def __init__(self, config: LapaConfig):
        super().__init__()
        self.embed = PatchEmbedding(config)
        # Relative positions give the same numbers for every input: computed once, at conversion.
        self.bias = nn.Parameter(torch.empty(config.heads, config.num_patches, config.num_patches))
        self.spatial = Transformer(config, config.spatial_depth)
        self.temporal = Transformer(config, config.temporal_depth)
        self.latent = LatentHead(config)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, 2, 3, R, R) on the 0..1 scale → (B, n·a), slot 0's `a` numbers first."""
        x = self.embed(clip)  # (B, 2, N, D)
        x = self.spatial(x, self.bias)
        y = self.temporal(x.transpose(1, 2), None)  # (B, N, 2, D): the two frames of each patch
        latents = self.latent(y.transpose(1, 2))  # (B, 2, n, a)
        return (latents[:, 1] - latents[:, 0]).flatten(1)


class PatchEmbedding(nn.Module):
    """Frames (..., 3, R, R) → (..., N, D), patches row-major, pixels by channel, row, column."""

    def __init__(self, config: LapaConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.norm_in = nn.LayerNorm(config.patch_values)
        self.proj = nn.Linear(config.patch_values, config.dim)
        self.norm_out = nn.LayerNorm(config.dim)

    def forward(self, frames: Tensor) -> Tensor:
        P = self.patch_size
        patches = frames.unflatten(-1, (-1, P)).unflatten(-3, (-1, P))  # (..., 3, G, P, G, P)
        patches = patches.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)  # (..., N, 3·P·P)
        return self.norm_out(self.proj(self.norm_in(patches)))


class Transformer(nn.Module):
    """Blocks over (B, S, L, D): S sequences of L positions, each attending within itself."""

    def __init__(self, config: LapaConfig, depth: int, with_context: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(config, with_context) for _ in range(depth)])
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, bias: Tensor | None, context: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, bias, context)
        return self.norm(x)


class Block(nn.Module):
    """Convolution over time and space, attention, cross-attention where there is a context, MLP."""

    def __init__(self, config: LapaConfig, with_context: bool):
        super().__init__()
        self.peg = PositionConvolution(config)
        self.attn = Attention(config)
        self.cross = CrossAttention(config) if with_context else None
        self.ff = FeedForward(config)

    def forward(self, x: Tensor, bias: Tensor | None, context: Tensor | None) -> Tensor:
        x = x + self.peg(x)
        x = x + self.attn(x, bias)
        if self.cross is not None:
            x = x + self.cross(x, context)
        return x + self.ff(x)


class PositionConvolution(nn.Module):
    """Depthwise 3 × 3 × 3 convolution: space padded by 1, time by 2 before and 0 after.

    It reads its input in memory order as (time, row, column). That is right for sequences of patches, but
    not for pairs of frames (N, 2); the published weights were trained that way.
    """

    def __init__(self, config: LapaConfig):
        super().__init__()
        self.num_patches, self.grid_size = config.num_patches, config.grid_size
        self.weight = nn.Parameter(torch.empty(config.dim, 1, 3, 3, 3))
        self.bias = nn.Parameter(torch.empty(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, L, D) → same shape, S·L = T·N with T 1 or 2."""
        B, D, G = len(x), x.shape[-1], self.grid_size
        frames = x.reshape(B, -1, G, G, D).movedim(-1, 2)  # (B, T, D, G, G)
        T = frames.shape[1]
        # Time 0 sees only zeros and itself, time 1 also sees time 0: two 2D convolutions are enough.
        own = F.conv2d(frames.flatten(0, 1), self.weight[:, :, 2], self.bias, padding=1, groups=D)
        own = own.unflatten(0, (B, T))
        if T == 2:
            earlier = F.conv2d(frames[:, 0], self.weight[:, :, 1], padding=1, groups=D)
            own = torch.stack([own[:, 0], own[:, 1] + earlier], dim=1)
        return own.movedim(2, -1).reshape(x.shape)


class Attention(nn.Module):
    """Multi-head attention: queries from the normalised input, keys and values from the input as it is."""

    def __init__(self, config: LapaConfig):
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.dim)
        self.q = nn.Linear(config.dim, inner, bias=False)
        self.kv = nn.Linear(config.dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, config.dim, bias=False)
        self.q_scale = nn.Parameter(torch.empty(config.dim_head))
        self.k_scale = nn.Parameter(torch.empty(config.dim_head))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, S, L, D), bias (h, L, L), or None of pairs → (B, S, L, D)."""
        k, v = self._split(self.kv(x)).chunk(2, dim=-3)
        return self._pair(x, k, v) if bias is None else self._attend(x, k, v, bias)

    def _pair(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """L = 2 written out, without B·S·h tiny softmaxes: each position weighs the same two values."""
        q = F.normalize(self._split(self.q(self.norm(x))), dim=-1) * self.q_scale
        k = F.normalize(k, dim=-1) * self.k_scale
        advantage = LOGIT_SCALE * (q * (k[..., 1:, :] - k[..., :1, :])).sum(-1, keepdim=True)
        mixed = torch.lerp(v[..., :1, :], v[..., 1:, :], torch.sigmoid(advantage))
        return self.out(mixed.transpose(-3, -2).flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        """(..., L, g·e) → (..., g, L, e)."""
        return x.unflatten(-1, (-1, len(self.q_scale))).transpose(-3, -2)

    def _attend(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q = F.normalize(self._split(self.q(self.norm(x))), dim=-1) * self.q_scale
        k = F.normalize(k, dim=-1) * self.k_scale
        if bias is not None:
            bias = bias.unsqueeze(0)
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))  # (B·S, h, L, e)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=LOGIT_SCALE)
        return self.out(mixed.transpose(-3, -2).flatten(-2)).view(x.shape)


class CrossAttention(Attention):
    """Attention to a context, with learned keys and values in front of it."""

    def __init__(self, config: LapaConfig):
        super().__init__(config)
        self.context_norm = nn.LayerNorm(config.dim)
        self.null_kv = nn.Parameter(torch.empty(config.heads, 2 * NULL_PAIRS, config.dim_head))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x (B, S, L, D), context (B, n, D) → (B, S, L, D)."""
        assert context is not None
        k, v = self._split(self.kv(self.context_norm(context))).chunk(2, dim=-3)  # (B, h, n, e)
        nulls = self.null_kv.unflatten(1, (NULL_PAIRS, 2)).expand(len(x), -1, -1, -1, -1)
        k, v = (torch.cat([nulls[:, :, :, i], part], dim=2).unsqueeze(1) for i, part in enumerate((k, v)))
        return self._attend(x, k, v, None)


NULL_PAIRS = 2


class FeedForward(nn.Module):
    def __init__(self, config: LapaConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, 2 * config.ff_dim, bias=False)
        self.down = nn.Linear(config.ff_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class LatentHead(nn.Module):
    """Patch features (B, T, N, D) → (B, T, n, a): projected, then convolved down to n places."""

    def __init__(self, config: LapaConfig):
        super().__init__()
        a = config.action_latent_dim
        first, second = HEADS[config.num_learned_tokens]
        self.grid_size = config.grid_size
        self.proj = nn.Linear(config.dim, a)
        self.conv1 = nn.Conv2d(a, a, first, stride=2, padding=1)
        self.conv2 = None if second is None else nn.Conv2d(a, a, second[0], second[1], second[2])

    def forward(self, x: Tensor) -> Tensor:
        B, T = x.shape[:2]
        z = self.proj(x).unflatten(2, (self.grid_size, -1)).flatten(0, 1).movedim(-1, 1)  # (B·T, a, G, G)
        z = self.conv1(z)
        if self.conv2 is not None:
            z = self.conv2(F.relu(z))
        return z.flatten(2).transpose(1, 2).unflatten(0, (B, T))


class LapaDecoder(nn.Module):
    """The earlier frame and a token → the later frame; its state dict is `decoder.*`."""

    def __init__(self, config: LapaConfig):
        super().__init__()
        self.patch_size, self.grid_size = config.patch_size, config.grid_size
        self.width = config.action_latent_dim
        self.context = nn.Linear(config.action_latent_dim, config.dim)
        self.blocks = Transformer(config, config.spatial_depth, with_context=True)
        self.pixels = nn.Linear(config.dim, config.patch_values)

    def forward(self, patches: Tensor, bias: Tensor, latents: Tensor) -> Tensor:
        """Predict frames.

        Args:
            patches: (B, 1, N, D), the encoder's patch embedding of the earlier frame.
            bias: (h, N, N), the encoder's.
            latents: (B, n·a).

        Returns:
            (B, 3, R, R) on the 0..1 scale, not clamped.
        """
        # The published decoder reads the n rows of width a as a rows of width n, and was trained so.
        rows = latents.unflatten(1, (self.width, -1)).transpose(1, 2)  # (B, n, a)
        x = self.blocks(patches, bias, self.context(rows)).squeeze(1)
        G, P = self.grid_size, self.patch_size
        grid = self.pixels(x).view(-1, G, G, 3, P, P)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, G * P, G * P)
