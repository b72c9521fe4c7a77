"""UniVLA's dimensions and encoder: spatio-temporal blocks over a pair's DINOv2 features, after latent rows.

The modules follow the specification of the published weights, not their keys: `convert.py` translates those.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend, attend_pair, split_heads
from ..config import ConvertedConfig
from ..quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class UniVlaConfig(ConvertedConfig):
    """Dimensions; the defaults are those of the published stage-2 weights.

    Args:
        image_size: Side R of the square that frames are resized to, in pixels; a multiple of
            `dino_patch_size`.
        model_dim, num_heads, enc_blocks: Width D, attention heads and blocks of the LAM's own encoder.
        irrelevant_codes: Codebook rows of the task-irrelevant slots.
        dino_patch_size, dino_dim, dino_depth, dino_num_heads, dino_registers: The DINOv2 tower.
    """

    num_learned_tokens: int = 4
    action_latent_dim: int = 128
    n_codes: int = 16
    stride_seconds: float | None = 0.9
    image_size: int = 224
    model_dim: int = 768
    num_heads: int = 12
    enc_blocks: int = 12
    irrelevant_codes: int = 16
    dino_patch_size: int = 14
    dino_dim: int = 768
    dino_depth: int = 12
    dino_num_heads: int = 12
    dino_registers: int = field(default=4, metadata={"least": 0})

    def problems(self) -> list[str]:
        problems = self.not_multiples(
            ("image_size", "dino_patch_size"), ("model_dim", "num_heads"), ("dino_dim", "dino_num_heads")
        )
        if self.model_dim % 2:
            problems.append(f"model_dim is {self.model_dim}, expected an even number (sines and cosines)")
        return problems

    @property
    def grid_size(self) -> int:
        """Patches along one side, G."""
        return self.image_size // self.dino_patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    @property
    def num_latents(self) -> int:
        """Latent rows in front of the patches: task-centric, then task-irrelevant ones."""
        return 2 * self.num_learned_tokens


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


class Dino(nn.Module):
    """The DINOv2 tower, a vision transformer with registers; only the patches' features leave it."""

    def __init__(self, config: UniVlaConfig):
        super().__init__()
        d, P = config.dino_dim, config.dino_patch_size
        self.patches = nn.Conv2d(3, d, kernel_size=P, stride=P)
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.registers = nn.Parameter(torch.empty(1, config.dino_registers, d))
        # Interpolated from the published table to this image size, once, at conversion.
        self.positions = nn.Parameter(torch.empty(1, 1 + config.num_patches, d))
        self.blocks = nn.ModuleList([DinoBlock(config) for _ in range(config.dino_depth)])
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def forward(self, frames: Tensor) -> Tensor:
        """(F, 3, R, R), normalised → (F, N, d), patches row-major."""
        patches = self.patches(frames).flatten(2).transpose(1, 2)
        first = self.cls_token + self.positions[:, :1]
        shared = torch.cat([first, self.registers], dim=1).expand(len(frames), -1, -1)
        x = torch.cat([shared, patches + self.positions[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, -patches.shape[1] :]


class DinoBlock(nn.Module):
    """Pre-norm attention and MLP, each with a learned elementwise scale."""

    def __init__(self, config: UniVlaConfig):
        super().__init__()
        d = config.dino_dim
        self.heads = config.dino_num_heads
        self.norm1 = nn.LayerNorm(d, eps=1e-6)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.scale1 = nn.Parameter(torch.empty(d))
        self.norm2 = nn.LayerNorm(d, eps=1e-6)
        self.fc1 = nn.Linear(d, 4 * d)
        self.fc2 = nn.Linear(4 * d, d)
        self.scale2 = nn.Parameter(torch.empty(d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.scale1 * self.proj(attend(q, k, v))
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


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
