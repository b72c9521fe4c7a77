"""A loaded LAPA latent action quantiser (LAQ): frames in, tokens out."""

import torch
from torch import Tensor, nn

from ..base import LatentActionModel
from ..precision import full_precision
from ..quantizer import Quantizer
from ..resize import pillow_bilinear
from .network import LapaConfig, LapaDecoder, LapaEncoder


class LapaLam(LatentActionModel):
    """Encoder, codebook and, if it was kept and asked for, the decoder of one model folder."""

    architecture = "LapaLaq"
    config_class = LapaConfig
    fdm_parts = ("decoder",)

    config: LapaConfig

    @classmethod
    def build_modules(cls, config: LapaConfig) -> dict[str, nn.Module]:
        return {"encoder": LapaEncoder(config), "vq": Quantizer(config), "decoder": LapaDecoder(config)}

    def resize_frames(self, frames: Tensor) -> Tensor:
        return pillow_bilinear(frames, self.config.image_size)

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 → float32 in 0..1."""
        return frames.float().div_(255)

    @torch.no_grad()
    def predict_pixels(self, frames: Tensor, latents: Tensor) -> Tensor:
        """The decoder's output, float32 (B, 3, R, R) on the 0..1 scale, not clamped; see `predict_next`."""
        self.check_prediction(frames, latents)
        with full_precision(self.device):
            inputs = self.preprocess(frames).unsqueeze(1).to(self.dtype)
            patches = self.encoder.embed(inputs)
            return self.decoder(patches, self.encoder.bias, latents.to(self.device, self.dtype)).float()

    def predict_next(self, frames: Tensor, latents: Tensor) -> Tensor:
        return (self.predict_pixels(frames, latents) * 255).round_().clamp_(0, 255).to(torch.uint8)
