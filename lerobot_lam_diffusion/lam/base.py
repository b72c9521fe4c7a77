"""What every latent action model offers, and what a family of them defines.

A family subclasses `LatentActionModel`: it names its config and its modules, and turns frame pairs into
vectors. Checks, quantisation, precision, devices, loading and fingerprints are here and in `loading.py`.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from lerobot_lam_diffusion.utils.errors import LamError

from .precision import full_precision
from .preprocess import check_frames, standardize


class LamTokens(NamedTuple):
    """Tokens of B frame pairs (or of B clips: then with an axis T-1 after B).

    Attributes:
        continuous: float32 (B, n·a), before quantisation.
        quantized: float32 (B, n·a), exact codebook rows; None for a LAM without a codebook.
        indices: int64 (B, n), in 0..K-1; None for a LAM without a codebook.
    """

    continuous: Tensor
    quantized: Tensor | None = None
    indices: Tensor | None = None

    def of_kind(self, use_vq_tokens: bool) -> Tensor:
        """The tokens (B, n·a): codebook rows, or the vectors before quantisation."""
        return _present(self.quantized) if use_vq_tokens else self.continuous

    def stored(self, use_vq_tokens: bool) -> Tensor:
        """What a store holds: indices (B, n), or the vectors before quantisation (B, n·a)."""
        return _present(self.indices) if use_vq_tokens else self.continuous


def _present(part: Tensor | None) -> Tensor:
    if part is None:
        raise LamError(
            "The LAM has no codebook, expected one for VQ tokens. Use its continuous tokens: "
            "use_vq_tokens=false, on a policy lam_use_vq_tokens=false."
        )
    return part


class LatentActionModel(ABC):
    """A loaded, frozen LAM: frames in, tokens out; made by `load_lam`.

    Not an `nn.Module`, so a policy that holds one neither trains nor saves it. All methods run without
    gradients, with autocast and TF32 off around them; results lie on `device`. With `dtype` bfloat16 the
    networks run in bfloat16, the quantiser still in float32.

    A family sets the class attributes and defines `build_modules`, `resize_frames` and, unless its encoder
    takes normalised clips, `continuous`.

    Attributes:
        architecture: Its name in `model_config.json`.
        config_class: Dataclass of its dimensions, a `TokenConfig`.
        token_parts: Modules that determine a token; the fingerprint covers their weights.
        fdm_parts: Modules that only predict frames, loaded on request; they may be absent from the file.
        other_parts: Modules that neither a token nor a predicted frame depends on.
    """

    architecture: ClassVar[str]
    config_class: ClassVar[Any]
    token_parts: ClassVar[tuple[str, ...]] = ("encoder", "vq")
    fdm_parts: ClassVar[tuple[str, ...]] = ()
    other_parts: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: Any,
        modules: dict[str, nn.Module],
        *,
        path: Path,
        revision: str | None,
        fingerprint: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.config = config
        self.modules = {name: module.eval().requires_grad_(False) for name, module in modules.items()}
        self.path = path
        self.revision = revision
        self.fingerprint = fingerprint
        self.dtype = dtype
        """Compute dtype of the networks."""
        self._batch_encoder: Callable[..., Tensor] | None = self.encoder
        self.to(device)

    # The interface that a family implements.

    @classmethod
    @abstractmethod
    def build_modules(cls, config: Any) -> dict[str, nn.Module]:
        """Its modules by the first part of their keys in `model.safetensors`; `vq` is a `Quantizer`.

        Called on the meta device, where tensors have no memory.
        """

    @abstractmethod
    def resize_frames(self, frames: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) → uint8 (..., 3, R, R), the same where frames have that size already."""

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 (..., 3, R, R) → float32, as the encoder takes them."""
        return standardize(frames)

    def continuous(self, prev: Tensor, cur: Tensor) -> Tensor:
        """Resized frames uint8 (B, 3, R, R), earlier and later → float (B, n·a) before quantisation.

        Use `self._batch_encoder` for the module `encoder`, so that `compile` takes effect.
        """
        assert self._batch_encoder is not None
        clips = self.normalize(torch.stack([prev, cur], dim=1)).to(self.dtype)
        return self._batch_encoder(clips).flatten(1).clone()  # a replayed CUDA graph overwrites its output

    def predict_next(self, frames: Tensor, latents: Tensor) -> Tensor:
        """The later frames of pairs, as the FDM predicts them.

        Args:
            frames: uint8 (B, 3, H, W), the earlier ones.
            latents: float (B, n·a), one token per frame.

        Returns:
            uint8 (B, 3, R, R), at the model's own size.
        """
        raise LamError(
            f"{self.path} predicts no images: {self.architecture} has no decoder to pixels. Choose a LAM "
            "that has one."
        )

    # The interface that the rest of the package uses.

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
        return self.num_learned_tokens * self.action_latent_dim

    @property
    def num_codes(self) -> int:
        """Codebook rows K; 0: no codebook."""
        return self.config.num_codes

    @property
    def encoder(self) -> Any:
        return self.modules.get("encoder")

    @property
    def vq(self) -> Any:
        """The quantiser, or None."""
        return self.modules.get("vq")

    @property
    def decoder(self) -> Any:
        """The FDM, if it was asked for, or None."""
        return self.modules.get("decoder")

    @property
    def codebook(self) -> Tensor | None:
        """float32 (K, a); None: tokens are continuous only."""
        return None if self.vq is None else self.vq.embedding.weight.detach()

    @property
    def token_scale(self) -> float:
        """What a policy divides tokens by: the RMS of the codebook's entries (1 for a codebook of zeros)."""
        if self.codebook is None:
            return float(self.config.token_scale)
        return math.sqrt(float(self.codebook.cpu().double().square().mean())) or 1.0

    @property
    def stride_seconds(self) -> float | None:
        """Seconds between the frames of a training pair, if known."""
        return self.config.stride_seconds

    def to(self, device: torch.device | str) -> Self:
        """Move to another device, in place."""
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        for module in self.modules.values():
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
        check_axes("prev", prev, 4, "(B, 3, H, W)")
        check_axes("cur", cur, 4, "(B, 3, H, W)")
        if prev.shape != cur.shape:
            raise LamError(
                f"prev has shape {tuple(prev.shape)} and cur {tuple(cur.shape)}, expected one shape "
                "(B, 3, H, W) for both. Pass both frames of every pair in one order."
            )
        with full_precision(self.device):
            prev, cur = (self.resize_frames(frames.to(self.device)) for frames in (prev, cur))
            if not len(prev):
                return self._quantised(torch.empty(0, self.token_dim, device=self.device))
            plain = self._uncompiled()
            alone = lambda row: plain.continuous(prev[row : row + 1], cur[row : row + 1])  # noqa: E731
            return self._quantised(self.continuous(prev, cur), alone)

    def _quantised(self, continuous: Tensor, alone: Callable[[int], Tensor] | None = None) -> LamTokens:
        """Tokens of vectors `(B, ..., n·a)`; `alone` computes those of one row without the others."""
        continuous = continuous.float()
        if self.vq is None:
            return LamTokens(continuous)
        indices = self.vq.indices(continuous)
        if alone is not None and self.dtype == torch.float32:
            # Kernels round differently for different batch shapes. A row with a nearly tied code is therefore
            # encoded on its own, which always rounds the same way, so that its index does not depend on the
            # rest of the batch. This is rare: about 1e-4 of the slots.
            tied = self.vq.nearly_tied(continuous).flatten(1).any(1)
            for row in tied.nonzero().flatten().tolist():
                indices[row] = self.vq.indices(alone(row).float())[0]
        return LamTokens(continuous, self.vq.rows(indices), indices)

    def _uncompiled(self) -> Self:
        """An uncompiled copy of this model; a copy, because several threads encode with one model."""
        plain = copy.copy(self)
        plain._batch_encoder = self.encoder
        return plain

    def resize(self, frames: Tensor) -> Tensor:
        """Frames at the model's own size, for callers that use each frame in several pairs.

        Args:
            frames: uint8 (..., 3, H, W).

        Returns:
            uint8 (..., 3, R, R) on `device`; `encode_pairs` gives the same tokens for them as for `frames`.
        """
        check_frames(frames)
        return self.resize_frames(frames.to(self.device, non_blocking=True))

    def preprocess(self, frames: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) → float32 (..., 3, R, R), as the encoder takes them."""
        return self.normalize(self.resize(frames))

    def compile(self) -> None:
        """Compile the encoder for later batches; takes a minute and pays off above some 100,000 pairs.

        On CUDA the kernels are replayed as a graph. Use a single batch shape. The uncompiled encoder decides
        nearly tied codes, so indices stay those of the uncompiled model.
        """
        if self.encoder is not None:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._batch_encoder = torch.compile(self.encoder, mode=mode)

    def check_prediction(self, frames: Tensor, latents: Tensor) -> None:
        """Refuse to predict without the FDM, or unless there is one token (B, n·a) per frame (B, 3, H, W)."""
        if self.decoder is None:
            raise LamError(
                f"{self.path} was opened without its FDM, expected it for predicting frames. "
                "Open it with load_lam(path, fdm=True)."
            )
        check_axes("frames", frames, 4, "(B, 3, H, W)")
        expected = (frames.shape[0], self.token_dim)
        if tuple(latents.shape) != expected:
            raise LamError(
                f"The latents have shape {tuple(latents.shape)}, expected {expected}: one token of "
                f"{self.num_learned_tokens} × {self.action_latent_dim} values per frame. "
                "Pass `quantized` or `continuous` of encode_pairs."
            )


def check_axes(name: str, frames: Tensor, ndim: int, expected: str) -> None:
    """Raise a LamError unless `frames` is uint8 RGB with `ndim` axes."""
    if frames.ndim != ndim:
        raise LamError(
            f"{name} has shape {tuple(frames.shape)}, expected uint8 {expected}. Add or drop axes."
        )
    check_frames(frames)


def proposed_stride(lams: Sequence[Any], fps: float) -> int | None:
    """The frame stride nearest to that of the LAMs' training: the shortest of several, None if unknown.

    Args:
        lams: Loaded LAMs, or their configs.
        fps: Frame rate of the dataset.
    """
    seconds = [lam.stride_seconds for lam in lams if lam.stride_seconds is not None]
    return max(1, round(min(seconds) * fps)) if seconds else None
