"""A loaded, frozen villa-X latent action model: frames in, tokens out."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .config import LamConfig
from .decoder import Decoder
from .encoder import Encoder
from .errors import LamError
from .precision import full_precision
from .preprocess import check_frames, denormalize_frames, normalize_frames, resize
from .quantizer import Quantizer


class LamTokens(NamedTuple):
    """Tokens of B frame pairs (or of B clips: then with an axis T-1 after B).

    Attributes:
        continuous: float32 (B, n·a), before quantisation.
        quantized: float32 (B, n·a), exact codebook rows.
        indices: int64 (B, n), in 0..K-1.
    """

    continuous: Tensor
    quantized: Tensor
    indices: Tensor


class LatentActionModel:
    """Encoder, codebook and, on request, FDM of one model folder; made by `load_lam`.

    Not an `nn.Module`, so a policy that holds one neither trains nor saves it. All methods run without
    gradients, with autocast and TF32 off around them; results lie on `device`. With `dtype` bfloat16 the
    networks run in bfloat16, the quantiser still in float32.
    """

    def __init__(
        self,
        config: LamConfig,
        encoder: Encoder,
        vq: Quantizer,
        decoder: Decoder | None,
        *,
        path: Path,
        revision: str | None,
        fingerprint: str,
    ):
        self.config = config
        self.encoder = encoder.eval().requires_grad_(False)
        self._batch_encoder: Callable[[Tensor], Tensor] = self.encoder
        self.vq = vq.eval().requires_grad_(False)
        self.decoder = None if decoder is None else decoder.eval().requires_grad_(False)
        self.path = path
        self.revision = revision
        self.fingerprint = fingerprint

    @property
    def num_learned_tokens(self) -> int:
        """Slots n per frame pair."""
        return self.config.num_learned_tokens

    @property
    def action_latent_dim(self) -> int:
        """Width a of one slot."""
        return self.config.action_latent_dim

    @property
    def token_dim(self) -> int:
        """Width n·a of a token."""
        return self.config.token_dim

    @property
    def num_codes(self) -> int:
        """Codebook rows K."""
        return self.config.n_codes

    @property
    def codebook(self) -> Tensor:
        """float32 (K, a)."""
        return self.vq.embedding.weight.detach()

    @property
    def device(self) -> torch.device:
        return self.codebook.device

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the networks."""
        return self.encoder.pe_spatial.dtype

    def to(self, device: torch.device | str) -> "LatentActionModel":
        """Move to another device, in place."""
        for module in (self.encoder, self.vq, self.decoder):
            if module is not None:
                module.to(device)
        return self

    @torch.no_grad()
    def encode_pairs(self, prev: Tensor, cur: Tensor) -> LamTokens:
        """Tokens of frame pairs.

        Args:
            prev, cur: uint8 (B, 3, H, W), any size, the earlier and the later frame of each pair.

        Raises:
            LamError: if the frames are not uint8 RGB, or differ in shape.
        """
        _check_axes("prev", prev, 4, "(B, 3, H, W)")
        _check_axes("cur", cur, 4, "(B, 3, H, W)")
        if prev.shape != cur.shape:
            raise LamError(
                f"prev has shape {tuple(prev.shape)} and cur {tuple(cur.shape)}, expected one shape "
                "(B, 3, H, W) for both. Pass both frames of every pair in one order."
            )
        tokens = self.encode_clip(torch.stack([prev, cur.to(prev.device)], dim=1))
        return LamTokens(*(part.squeeze(1) for part in tokens))

    @torch.no_grad()
    def encode_clip(self, clip: Tensor) -> LamTokens:
        """Tokens of all neighbouring pairs of clips, each seeing up to d_t-1 frames before its later one.

        Args:
            clip: uint8 (B, T, 3, H, W), T ≥ 2, any frame size.

        Returns:
            LamTokens with leading axes (B, T-1).
        """
        _check_axes("clip", clip, 5, "(B, T, 3, H, W)")
        B, T = clip.shape[:2]
        if T < 2:
            raise LamError(
                f"The clip has {T} frame, expected at least 2. Pass the frames of one pair or more."
            )
        with full_precision(self.device):
            frames = normalize_frames(clip.to(self.device), self.config.resolution).to(self.dtype)
            if not B:
                empty = torch.empty(0, T - 1, self.token_dim, device=self.device)
                return LamTokens(empty, empty, self.vq.indices(empty))
            continuous = self._slide(frames, self._batch_encoder).float()
            indices = self.vq.indices(continuous)
            if self.dtype == torch.float32:
                self._settle(indices, continuous, frames)
            return LamTokens(continuous, self.vq.rows(indices), indices)

    def _settle(self, indices: Tensor, continuous: Tensor, frames: Tensor) -> None:
        """Decide nearly tied codes by encoding their clip alone, in place.

        Kernels round differently from one batch shape to another; a clip alone always goes the same way, so
        an index does not depend on what else was in the batch. Rare: some 1e-4 of the slots.
        """
        tied = self.vq.nearly_tied(continuous).flatten(1).any(1)
        for row in tied.nonzero().flatten().tolist():
            alone = self._slide(frames[row : row + 1], self.encoder)
            indices[row] = self.vq.indices(alone.float())[0]

    def _slide(self, frames: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, T, 3, R, R) → (B, T-1, n·a): beyond d_t frames, each later window gives only its last token."""
        d_t = self.config.d_t
        first = encoder(frames[:, :d_t])
        starts = range(1, frames.shape[1] - d_t + 1)
        later = [encoder(frames[:, start : start + d_t])[:, -1:] for start in starts]
        return torch.cat([first, *later], dim=1)

    def resize(self, frames: Tensor) -> Tensor:
        """Frames at the model's own size, for callers that use each frame in several pairs.

        Args:
            frames: uint8 (..., 3, H, W).

        Returns:
            uint8 (..., 3, R, R) on `device`; `encode_pairs` gives the same tokens for them as for `frames`.
        """
        check_frames(frames)
        return resize(frames.to(self.device, non_blocking=True), self.config.resolution)

    def compile(self) -> None:
        """Compile the encoder for the batches to come; takes a minute, pays over some 100,000 pairs.

        On CUDA the kernels are replayed as a graph. Keep to one batch shape. Nearly tied codes are settled by
        the uncompiled encoder, so indices stay those of the uncompiled model.
        """
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self._batch_encoder = torch.compile(self.encoder, mode=mode)

    def preprocess(self, frames: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) → float32 (..., 3, R, R), as the model sees them."""
        return normalize_frames(frames.to(self.device), self.config.resolution)

    @torch.no_grad()
    def predict_patches(self, frames: Tensor, latents: Tensor) -> Tensor:
        """The FDM's raw output, float32 (B, N, P·P·C) in the normalised scale; see `predict_next`."""
        decoder = self._fdm()
        _check_axes("frames", frames, 4, "(B, 3, H, W)")
        expected = (frames.shape[0], self.token_dim)
        if tuple(latents.shape) != expected:
            raise LamError(
                f"The latents have shape {tuple(latents.shape)}, expected {expected}: one token of "
                f"{self.num_learned_tokens} × {self.action_latent_dim} numbers per frame. "
                "Pass `quantized` or `continuous` of encode_pairs."
            )
        with full_precision(self.device):
            inputs = normalize_frames(frames.to(self.device), self.config.resolution).to(self.dtype)
            return decoder(inputs, latents.to(self.device, self.dtype)).float()

    @torch.no_grad()
    def predict_next(self, frames: Tensor, latents: Tensor) -> Tensor:
        """The next frames as the FDM sees them.

        Args:
            frames: uint8 (B, 3, H, W).
            latents: float (B, n·a), one token per frame.

        Returns:
            uint8 (B, 3, R, R), R the model's resolution.
        """
        decoder = self._fdm()
        if self.config.in_channels != 3:
            raise LamError(
                f"The FDM of {self.path} predicts {self.config.in_channels} channels (in_channels of its "
                "config), expected 3 for an RGB frame. Use predict_patches for its raw output."
            )
        return denormalize_frames(decoder.unpatch(self.predict_patches(frames, latents)))

    def _fdm(self) -> Decoder:
        if self.decoder is None:
            raise LamError(
                f"{self.path} was opened without its FDM, expected it for predicting frames. "
                "Open it with load_lam(path, fdm=True)."
            )
        return self.decoder


def _check_axes(name: str, frames: Tensor, ndim: int, expected: str) -> None:
    if frames.ndim != ndim:
        raise LamError(
            f"{name} has shape {tuple(frames.shape)}, expected uint8 {expected}. Add or drop axes."
        )
    check_frames(frames)
