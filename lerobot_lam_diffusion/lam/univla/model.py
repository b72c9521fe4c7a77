"""A loaded UniVLA latent action model (stage 2): frames in, tokens out."""

import torch
from torch import Tensor, nn

from ..base import LamTokens, LatentActionModel
from ..precision import full_precision
from ..preprocess import standardize
from ..quantizer import Quantizer
from .config import UniVlaConfig
from .network import Irrelevant, UniVlaEncoder
from .resize import resize


class UniVlaLam(LatentActionModel):
    """DINOv2 tower, encoder and codebook of one model folder. Its FDM predicts features, and is not kept."""

    architecture = "UniVlaLam"
    config_class = UniVlaConfig

    config: UniVlaConfig

    @classmethod
    def build_modules(cls, config: UniVlaConfig) -> dict[str, nn.Module]:
        return {"encoder": UniVlaEncoder(config), "vq": Quantizer(config), "irrelevant": Irrelevant(config)}

    @classmethod
    def expected_blocks(cls, config: UniVlaConfig) -> dict[str, int]:
        return {"encoder.dino.blocks": config.dino_depth, "encoder.blocks": config.enc_blocks}

    def resize_frames(self, frames: Tensor) -> Tensor:
        return resize(frames, self.config.image_size)

    def continuous(self, prev: Tensor, cur: Tensor) -> Tensor:
        assert self._batch_encoder is not None
        return self._batch_encoder(
            self._clip(prev, cur)
        ).clone()  # a replayed CUDA graph overwrites its output

    def _clip(self, prev: Tensor, cur: Tensor) -> Tensor:
        return standardize(torch.stack([prev, cur], dim=1)).to(self.dtype)

    def preprocess(self, frames: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) → float32 (..., 3, R, R), as the model sees them."""
        return standardize(self.resize(frames))

    @torch.no_grad()
    def encode_irrelevant(self, prev: Tensor, cur: Tensor) -> LamTokens:
        """The task-irrelevant slots of frame pairs, uint8 (B, 3, H, W) each; no token has any of it."""
        part: Irrelevant = self.modules["irrelevant"]  # type: ignore[assignment]
        n = self.num_learned_tokens
        with full_precision(self.device):
            clip = self._clip(self.resize(prev), self.resize(cur))
            latents = part.proj(self.encoder.later_latents(clip)[:, n:]).flatten(1).float()
            indices = part.vq.indices(latents)
            return LamTokens(latents, part.vq.rows(indices), indices)
