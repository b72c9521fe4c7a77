"""Tokens from raw frames, in training and on the robot: the same values that a store holds.

Training gets a window of frames from the dataset, a robot one frame per tick; both call `LiveLam.encode`.
There are no frames before an episode's first one (LeRobot pads with copies), so a pair that needs one has no
token and gets zeros, as in a store. `LiveTokens` concatenates the tokens of several sources (cameras, LAMs).
"""

import logging
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lerobot.utils.constants import OBS_PREFIX
from torch import Tensor

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.constants import OBS_LAM_IMAGES
from lerobot_lam_diffusion.policy.lams import open_lams
from lerobot_lam_diffusion.sources import LamSource
from lerobot_lam_diffusion.utils.errors import DatasetError, TrainingError

if TYPE_CHECKING:  # training on precomputed tokens imports no LAM
    from lerobot_lam_diffusion.lam import LamTokens, LatentActionModel
    from lerobot_lam_diffusion.policy.live_cache import LiveCache

logger = logging.getLogger(__name__)


class LiveTokens:
    """Computes a policy's tokens from frames, for all its sources side by side.

    The LAMs are loaded on first use. This is not an `nn.Module`, so they are in no optimizer, checkpoint,
    DDP bucket or parameter count.
    """

    def __init__(self, config: DiffusionLamConfig) -> None:
        self._config = config
        self._lams: list[LiveLam] | None = None

    @property
    def lams(self) -> "list[LiveLam]":
        """One for each source; loaded and checked on first use."""
        if self._lams is None:
            sources = self._config.token_sources
            models = open_lams(self._config)
            self._lams = [LiveLam(self._config, *each) for each in zip(sources, models, strict=True)]
            for source in sources:
                logger.info("LAM tokens: on the fly, by %s from %s.", source.model_path, source.camera_key)
        return self._lams

    @property
    def loaded(self) -> "LatentActionModel | tuple[LatentActionModel, ...] | None":
        """The LAM, those of several sources, or None while they are not loaded."""
        models = tuple(live.model for live in self._lams or ())
        return models[0] if len(models) == 1 else models or None

    def warm_up(self) -> None:
        """Move the LAMs to the policy's device and run them once, so that a robot need not wait for it."""
        blank = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=self._config.device)
        for live in self.lams:
            live.encode(blank, blank)

    def use_caches(self, caches: "Sequence[LiveCache]") -> None:
        """Cache the tokens of a training dataset's frames, each source's in its own cache."""
        for live, cache in zip(self.lams, caches, strict=True):
            live.cache = cache

    def window(self, batch: dict[str, Any]) -> Tensor:
        """Conditioning tokens `(B, lam_conditioning_steps, lam_token_dim)` of a dataset batch.

        Args:
            batch: Raw frames for each of the policy's `observation_delta_indices`, padding flags and, for a
                cache, `index`.
        """
        deltas = self._config.observation_delta_indices
        frames = raw_frames(self._config, batch)
        for camera, seen in frames.items():
            if seen.ndim != 5 or seen.shape[1] != len(deltas):
                raise TrainingError(
                    f"frames of {camera!r} have shape {tuple(seen.shape)}, expected (B, {len(deltas)}, 3, H, "
                    f"W): one frame for each of the policy's observation_delta_indices {deltas}"
                )
        is_pad = _padding(batch, next(iter(frames.values())))
        index = batch.get("index")
        tokens = [live.window(frames[live.camera_key], deltas, is_pad, index) for live in self.lams]
        return torch.cat(tokens, dim=-1)

    def newest(self, history: "dict[str, FrameHistory]") -> Tensor:
        """Tokens of offsets up to 0, `(B, steps, lam_token_dim)`, at this tick.

        Args:
            history: Camera → its frames.
        """
        return torch.cat([history[live.camera_key].tokens(live) for live in self.lams], dim=-1)


class LiveLam:
    """One source: a LAM that looks at one camera, on the device of its frames.

    Attributes:
        camera_key: The camera, as the policy names it.
        model: The LAM; other sources may share it.
        cache: Cached tokens of a training dataset's frames, if asked for.
    """

    def __init__(self, config: DiffusionLamConfig, source: LamSource, model: "LatentActionModel") -> None:
        self.camera_key = str(source.camera_key)
        self.model = model
        self.cache: LiveCache | None = None
        self._config = config

    def encode(self, prev: Tensor, cur: Tensor) -> Tensor:
        """Tokens float32 `(P, n·a)` of uint8 frame pairs `(P, 3, H, W)`, without gradients."""
        return self._encode_pairs(prev, cur).of_kind(self._config.lam_use_vq_tokens)

    def _encode_pairs(self, prev: Tensor, cur: Tensor) -> "LamTokens":
        if self.model.device != prev.device:
            self.model.to(prev.device)
        return self.model.encode_pairs(prev, cur)

    def window(self, frames: Tensor, deltas: list[int], is_pad: Tensor, index: Tensor | None) -> Tensor:
        """Conditioning tokens of a training batch, float32 `(B, lam_conditioning_steps, n·a)`.

        Args:
            frames: uint8 `(B, T, 3, H, W)`, one for each of `deltas`.
            deltas: Frame offsets of the window, ascending.
            is_pad: bool `(B, T)`: whether the frame is a padding copy that LeRobot added beyond the episode.
            index: int64 `(B,)` absolute frame indices.
        """
        stride = self._config.lam_frame_stride or 1
        steps = self._config.lam_token_deltas
        cur_at = [deltas.index(delta) for delta in steps]
        prev_at = [deltas.index(delta - stride) for delta in steps]
        cur, prev = (frames[:, at].flatten(0, 1) for at in (cur_at, prev_at))  # (B * steps, 3, H, W)
        exists = ~(is_pad[:, cur_at] | is_pad[:, prev_at]).flatten()
        tokens = torch.zeros(len(cur), self.model.token_dim, device=frames.device)
        if exists.any():
            frame = None
            if index is not None:
                frame = (index.unsqueeze(1) + torch.tensor(steps, device=index.device)).flatten()[exists]
            tokens[exists] = self._cached(prev[exists], cur[exists], frame)
        return tokens.unflatten(0, (len(frames), len(steps)))

    def _cached(self, prev: Tensor, cur: Tensor, frame: Tensor | None) -> Tensor:
        """`encode`, by way of the cache if there is one."""
        if self.cache is not None and frame is not None:
            return self.cache.tokens(prev, cur, frame, self._encode_pairs)
        if self.cache is not None:
            self.cache.disable("the batch has no 'index', which identifies the frames")
        return self.encode(prev, cur)


class FrameHistory:
    """A camera's frames since the last reset, just enough for the tokens of offsets up to 0."""

    def __init__(self, config: DiffusionLamConfig) -> None:
        self._stride = config.lam_frame_stride or 1
        self._deltas = config.past_token_deltas
        self._frames: deque[Tensor] = deque(maxlen=1 - self._deltas[0] + self._stride)

    def append(self, frames: Tensor) -> None:
        """Add this tick's frames, uint8 `(B, 3, H, W)`."""
        self._frames.append(frames.clone())  # a camera's driver may fill the same memory again

    def tokens(self, live: LiveLam) -> Tensor:
        """Tokens `(B, number of offsets up to 0, n·a)` at this tick; zero before the first pair."""
        frames = list(self._frames)
        newest = frames[-1]
        tokens = torch.zeros(len(newest), len(self._deltas), live.model.token_dim, device=newest.device)
        known = [delta for delta in self._deltas if len(frames) > self._stride - delta]
        if known:
            cur = torch.cat([frames[delta - 1] for delta in known])
            prev = torch.cat([frames[delta - 1 - self._stride] for delta in known])
            encoded = live.encode(prev, cur).unflatten(0, (len(known), -1))  # (known, B, n·a)
            tokens[:, -len(known) :] = encoded.transpose(0, 1)
        return tokens


def raw_frames(config: DiffusionLamConfig, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Camera → uint8 frames `(..., 3, H, W)` for the LAMs, as the pre-processor passed them on.

    Raises:
        UserError: there are none, or none of a LAM's camera.
    """
    from lerobot_lam_diffusion.lam.preprocess import as_uint8

    cameras = list(dict.fromkeys(str(source.camera_key) for source in config.token_sources))
    frames = batch.get(OBS_LAM_IMAGES)
    if frames is None:
        raise TrainingError(
            f"the batch has no raw frames under {OBS_LAM_IMAGES!r} for the LAM, only {sorted(batch)}: use "
            "the pre-processor of this policy (make_pre_post_processors, or the one saved with its "
            "checkpoint)"
        )
    if isinstance(frames, Tensor):
        frames = {cameras[0]: frames}
    unknown = ", ".join(repr(camera) for camera in cameras if camera not in frames)
    if unknown:
        raise DatasetError(
            f"the LAM's camera {unknown} is not among the cameras {sorted(frames)} of the dataset, robot or "
            "environment: name one by --policy.lam_camera_key, or give one that name by --rename_map (PushT "
            "has images with --env.obs_type=pixels_agent_pos)"
        )
    return {camera: as_uint8(frames[camera]) for camera in cameras}


def _padding(batch: dict[str, Any], frames: Tensor) -> Tensor:
    """Which frames `(B, T)` are LeRobot's padding copies: those marked by all padding flags.

    The flags of all observations agree, except for a few video frames that LeRobot's streaming marks because
    of a rounding error but delivers anyway.
    """
    flags = [
        value.to(frames.device)
        for key, value in batch.items()
        if key.startswith(OBS_PREFIX) and key.endswith("_is_pad") and value.shape == frames.shape[:2]
    ]
    if flags:
        return torch.stack(flags).all(0)
    raise TrainingError(
        "the batch does not tell which frames are padding (no 'observation.*_is_pad'), so that tokens at "
        "episode starts cannot be told from motion: build the dataset with delta_timestamps"
    )
