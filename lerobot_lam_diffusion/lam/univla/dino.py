"""The DINOv2 tower: frames → features of their patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UniVlaConfig


class Dino(nn.Module):
    """Vision transformer with registers; only the patches' features leave it."""

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
        count = len(frames)
        x = torch.cat(
            [
                first.expand(count, -1, -1),
                self.registers.expand(count, -1, -1),
                patches + self.positions[:, 1:],
            ],
            dim=1,
        )
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
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.scale1 * self.proj(attend(q, k, v, self.heads))
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention over (B, L, h·e); a head is a contiguous group of channels."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
