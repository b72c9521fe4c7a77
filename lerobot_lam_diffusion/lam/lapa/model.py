"""A loaded LAPA latent action quantiser (LAQ): frames in, tokens out."""

import torch
from torch import Tensor, nn

from ..base import LatentActionModel
from ..precision import full_precision
from ..quantizer import Quantizer
from .config import LapaConfig
from .network import LapaDecoder, LapaEncoder
from .resize import resize


class LapaLam(LatentActionModel):
    """Encoder, codebook and, where it was kept and asked for, the decoder of one model folder."""

    architecture = "LapaLaq"
    config_class = LapaConfig
    fdm_parts = ("decoder",)

    config: LapaConfig

    @classmethod
    def build_modules(cls, config: LapaConfig) -> dict[str, nn.Module]:
        return {"encoder": LapaEncoder(config), "vq": Quantizer(config), "decoder": LapaDecoder(config)}

    @classmethod
    def expected_blocks(cls, config: LapaConfig) -> dict[str, int]:
        return {
            "encoder.spatial.blocks": config.spatial_depth,
            "encoder.temporal.blocks": config.temporal_depth,
            "decoder.blocks.blocks": config.spatial_depth,
        }

    def resize_frames(self, frames: Tensor) -> Tensor:
        return resize(frames, self.config.image_size)

    def continuous(self, prev: Tensor, cur: Tensor) -> Tensor:
        assert self._batch_encoder is not None
        clip = torch.stack([prev, cur], dim=1).float().div_(255).to(self.dtype)
        return self._batch_encoder(clip).clone()  # a replayed CUDA graph overwrites its output

    def preprocess(self, frames: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) → float32 (..., 3, R, R) in 0..1, as the model sees them."""
        return self.resize(frames).float().div_(255)

    @torch.no_grad()
    def predict_pixels(self, frames: Tensor, latents: Tensor) -> Tensor:
        """The decoder's output, float32 (B, 3, R, R) on the 0..1 scale, not clamped; see `predict_next`."""
        decoder = self.fdm()
        self.check_latents(frames, latents)
        with full_precision(self.device):
            inputs = self.preprocess(frames).unsqueeze(1).to(self.dtype)
            patches = self.encoder.embed(inputs)
            return decoder(patches, self.encoder.bias, latents.to(self.device, self.dtype)).float()

    def predict_next(self, frames: Tensor, latents: Tensor) -> Tensor:
        """The later frames of pairs.

        Args:
            frames: uint8 (B, 3, H, W), the earlier ones.
            latents: float (B, n·a), one token per frame.

        Returns:
            uint8 (B, 3, R, R), R the model's image size.
        """
        return (self.predict_pixels(frames, latents) * 255).round_().clamp_(0, 255).to(torch.uint8)
