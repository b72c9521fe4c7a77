"""What every latent action model offers, and what a family of them has to say.

A family subclasses `LatentActionModel`: it names its config and its modules, and turns frame pairs into
vectors. Checks, quantisation, precision, devices, loading and fingerprints are here and in `loading.py`.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from .config import TokenShape
from .errors import LamError
from .precision import full_precision
from .preprocess import check_frames


class LamTokens(NamedTuple):
    """Tokens of B frame pairs (or of B clips: then with an axis T-1 after B).

    Attributes:
        continuous: float32 (B, n·a), before quantisation.
        quantized: float32 (B, n·a), exact codebook rows; None of a LAM without a codebook.
        indices: int64 (B, n), in 0..K-1; None of a LAM without a codebook.
    """

    continuous: Tensor
    quantized: Tensor | None = None
    indices: Tensor | None = None

    def of_kind(self, use_vq_tokens: bool) -> Tensor:
        """The tokens (B, n·a): codebook rows, or the vectors before quantisation."""
        return _present(self.quantized) if use_vq_tokens else self.continuous

    def stored(self, use_vq_tokens: bool) -> Tensor:
        """What a store keeps of them: indices (B, n), or the vectors before quantisation (B, n·a)."""
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

    A family sets the class attributes and defines `build_modules`, `resize_frames` and `continuous`.

    Attributes:
        architecture: Its name in `model_config.json`.
        config_class: Dataclass of its dimensions, a `TokenConfig`.
        token_parts: Modules that decide a token; their weights are what the fingerprint covers.
        fdm_parts: Modules that only predict frames: loaded on request, and may be absent from the file where
            `fdm_is_optional`.
    """

    architecture: ClassVar[str]
    config_class: ClassVar[Any]
    token_parts: ClassVar[tuple[str, ...]] = ("encoder", "vq")
    fdm_parts: ClassVar[tuple[str, ...]] = ()
    fdm_is_optional: ClassVar[bool] = True

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
        self._dtype = dtype
        self._device = torch.device(device)
        self._batch_encoder: Callable[..., Tensor] | None = self.modules.get("encoder")

    # What a family defines.

    @classmethod
    @abstractmethod
    def build_modules(cls, config: Any) -> dict[str, nn.Module]:
        """Its modules by the first part of their keys in `model.safetensors`; `vq` is a `Quantizer`.

        Called on the meta device, where tensors have no memory.
        """

    @abstractmethod
    def resize_frames(self, frames: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) → uint8 (..., 3, R, R), the same where frames have that size already."""

    @abstractmethod
    def continuous(self, prev: Tensor, cur: Tensor) -> Tensor:
        """Resized frames uint8 (B, 3, R, R), earlier and later → float (B, n·a) before quantisation.

        Use `self._batch_encoder` for the module `encoder`, so that `compile` takes effect.
        """

    @classmethod
    def expected_blocks(cls, config: Any) -> dict[str, int]:
        """Prefix of numbered modules → how many there are; checked before any is built."""
        return {}

    def predict_next(self, frames: Tensor, latents: Tensor) -> Tensor:
        """The next frames as the FDM sees them: uint8 (B, 3, H, W), float (B, n·a) → uint8 (B, 3, R, R)."""
        raise LamError(
            f"{self.path} predicts no pictures: {self.architecture} has no decoder to pixels. Choose a LAM "
            "that has one."
        )

    # What the rest of the package asks for.

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
    def vq(self) -> Any:
        """The quantiser, or None."""
        return self.modules.get("vq")

    @property
    def encoder(self) -> Any:
        return self.modules.get("encoder")

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
        """Seconds between the frames of a pair that the LAM was trained on, if that is known."""
        return self.config.stride_seconds

    @property
    def device(self) -> torch.device:
        first = next(self._tensors(), None)
        return self._device if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the networks."""
        return self._dtype

    def to(self, device: torch.device | str) -> Self:
        """Move to another device, in place."""
        self._device = torch.device(device)
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
            self._settle(indices, continuous, alone)
        return LamTokens(continuous, self.vq.rows(indices), indices)

    def _settle(self, indices: Tensor, continuous: Tensor, alone: Callable[[int], Tensor]) -> None:
        """Decide nearly tied codes by encoding their row alone, in place.

        Kernels round differently from one batch shape to another; a row alone always goes the same way, so
        an index does not depend on what else was in the batch. Rare: some 1e-4 of the slots.
        """
        tied = self.vq.nearly_tied(continuous).flatten(1).any(1)
        for row in tied.nonzero().flatten().tolist():
            indices[row] = self.vq.indices(alone(row).float())[0]

    def _uncompiled(self) -> Self:
        """The same model without what `compile` did. A twin, since several threads encode with one model."""
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

    def compile(self) -> None:
        """Compile the encoder for the batches to come; takes a minute, pays over some 100,000 pairs.

        On CUDA the kernels are replayed as a graph. Keep to one batch shape. Nearly tied codes are settled by
        the uncompiled encoder, so indices stay those of the uncompiled model.
        """
        if self.encoder is not None:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._batch_encoder = torch.compile(self.encoder, mode=mode)

    def check_latents(self, frames: Tensor, latents: Tensor) -> None:
        """Raise a LamError unless there is one token `(B, n·a)` for each of the frames `(B, 3, H, W)`."""
        check_axes("frames", frames, 4, "(B, 3, H, W)")
        expected = (frames.shape[0], self.token_dim)
        if tuple(latents.shape) != expected:
            raise LamError(
                f"The latents have shape {tuple(latents.shape)}, expected {expected}: one token of "
                f"{self.num_learned_tokens} × {self.action_latent_dim} numbers per frame. "
                "Pass `quantized` or `continuous` of encode_pairs."
            )

    def fdm(self, part: str = "decoder") -> Any:
        """A module that was loaded on request.

        Raises:
            LamError: if it was not.
        """
        if part not in self.modules:
            raise LamError(
                f"{self.path} was opened without its FDM, expected it for predicting frames. "
                "Open it with load_lam(path, fdm=True)."
            )
        return self.modules[part]

    def _tensors(self) -> Iterator[Tensor]:
        for module in self.modules.values():
            yield from module.parameters()
            yield from module.buffers()


def check_axes(name: str, frames: Tensor, ndim: int, expected: str) -> None:
    """Raise a LamError unless `frames` is uint8 RGB with `ndim` axes."""
    if frames.ndim != ndim:
        raise LamError(
            f"{name} has shape {tuple(frames.shape)}, expected uint8 {expected}. Add or drop axes."
        )
    check_frames(frames)


def proposed_stride(lams: Sequence[TokenShape], fps: float) -> int | None:
    """The frame stride at which pairs are as far apart as those these LAMs were trained on.

    Of LAMs that differ the shortest; None if none of them says.
    """
    seconds = [lam.stride_seconds for lam in lams if lam.stride_seconds is not None]
    return max(1, round(min(seconds) * fps)) if seconds else None
