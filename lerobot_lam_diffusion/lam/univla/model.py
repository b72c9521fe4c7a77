"""A loaded UniVLA latent action model (stage 2): frames in, tokens out."""

from typing import Any

import torch
from torch import Tensor, nn

from ..base import LamTokens, LatentActionModel
from ..precision import full_precision
from ..quantizer import Quantizer
from ..resize import tensorflow_lanczos3
from .network import Irrelevant, UniVlaConfig, UniVlaEncoder


class UniVlaLam(LatentActionModel):
    """DINOv2 tower, encoder and codebook of one model folder. Its FDM predicts features, and is not kept."""

    architecture = "UniVlaLam"
    config_class = UniVlaConfig
    other_parts = ("irrelevant",)

    config: UniVlaConfig

    @classmethod
    def build_modules(cls, config: UniVlaConfig) -> dict[str, nn.Module]:
        return {"encoder": UniVlaEncoder(config), "vq": Quantizer(config), "irrelevant": Irrelevant(config)}

    def resize_frames(self, frames: Tensor) -> Tensor:
        return tensorflow_lanczos3(frames, self.config.image_size)

    @torch.no_grad()
    def encode_irrelevant(self, prev: Tensor, cur: Tensor) -> LamTokens:
        """The task-irrelevant slots of frame pairs, uint8 (B, 3, H, W) each; they are no part of a token."""
        part: Any = self.modules["irrelevant"]
        n = self.num_learned_tokens
        with full_precision(self.device):
            clips = self.preprocess(torch.stack([prev, cur], dim=1)).to(self.dtype)
            latents = part.proj(self.encoder.later_latents(clips)[:, n:]).flatten(1).float()
            indices = part.vq.indices(latents)
            return LamTokens(latents, part.vq.rows(indices), indices)
