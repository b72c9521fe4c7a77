"""A loaded, frozen villa-X latent action model: frames in, tokens out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lerobot_lam_diffusion.utils.errors import LamError

from ..base import LamTokens, LatentActionModel, check_axes
from ..precision import full_precision
from ..preprocess import denormalize_frames
from ..quantizer import Quantizer
from ..resize import bilinear
from .config import LamConfig
from .decoder import Decoder
from .encoder import Encoder


class VillaXLam(LatentActionModel):
    """Encoder, codebook and, on request, FDM of one model folder."""

    architecture = "IgorModel"
    config_class = LamConfig
    fdm_parts = ("decoder",)

    config: LamConfig

    @classmethod
    def build_modules(cls, config: LamConfig) -> dict[str, nn.Module]:
        return {"encoder": Encoder(config), "vq": Quantizer(config), "decoder": Decoder(config)}

    def resize_frames(self, frames: Tensor) -> Tensor:
        return bilinear(frames, self.config.resolution)

    @torch.no_grad()
    def encode_clip(self, clip: Tensor) -> LamTokens:
        """Tokens of all neighbouring pairs of clips, each seeing up to d_t-1 frames before its later one.

        Args:
            clip: uint8 (B, T, 3, H, W), T ≥ 2, any frame size.

        Returns:
            LamTokens with leading axes (B, T-1).
        """
        check_axes("clip", clip, 5, "(B, T, 3, H, W)")
        B, T = clip.shape[:2]
        if T < 2:
            raise LamError(
                f"The clip has {T} frame, expected at least 2. Pass the frames of one pair or more."
            )
        with full_precision(self.device):
            frames = self.preprocess(clip).to(self.dtype)
            if not B:
                return self._quantised(torch.empty(0, T - 1, self.token_dim, device=self.device))
            assert self._batch_encoder is not None
            alone = lambda row: self._slide(frames[row : row + 1], self.encoder)  # noqa: E731
            return self._quantised(self._slide(frames, self._batch_encoder), alone)

    def _slide(self, frames: Tensor, encoder: Callable[..., Tensor]) -> Tensor:
        """(B, T, 3, R, R) → (B, T-1, n·a): beyond d_t frames, each later window gives only its last token."""
        d_t = self.config.d_t
        first = encoder(frames[:, :d_t])
        starts = range(1, frames.shape[1] - d_t + 1)
        later = [encoder(frames[:, start : start + d_t])[:, -1:] for start in starts]
        return torch.cat([first, *later], dim=1)

    @torch.no_grad()
    def predict_patches(self, frames: Tensor, latents: Tensor) -> Tensor:
        """The FDM's raw output, float32 (B, N, P·P·C) in the normalised scale; see `predict_next`."""
        self.check_prediction(frames, latents)
        with full_precision(self.device):
            inputs = self.preprocess(frames).to(self.dtype)
            return self.decoder(inputs, latents.to(self.device, self.dtype)).float()

    def predict_next(self, frames: Tensor, latents: Tensor) -> Tensor:
        patches = self.predict_patches(frames, latents)
        if self.config.in_channels != 3:
            raise LamError(
                f"The FDM of {self.path} predicts {self.config.in_channels} channels (in_channels of its "
                "config), expected 3 for an RGB frame. Use predict_patches for its raw output."
            )
        return denormalize_frames(self.decoder.unpatch(patches))
