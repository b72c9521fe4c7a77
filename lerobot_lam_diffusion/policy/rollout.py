"""Tokens at deployment, tick by tick.

    frames since reset() ─► LAM ─► tokens of offsets up to 0 ┐
    guide (a video, or an episode) ─► tokens of offsets > 0 ─┴► window (B, lam_conditioning_steps, n·a)

The history of frames lives here, not in a processor: `lerobot-eval` resets the policy only.
"""

import logging
from typing import Any

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.policy.guidance import Guide
from lerobot_lam_diffusion.policy.live import FrameHistory, LiveTokens, raw_frames
from lerobot_lam_diffusion.policy.tick_clock import TickClock
from lerobot_lam_diffusion.utils.errors import LamNotFoundError, TrainingError

logger = logging.getLogger(__name__)


class Rollout:
    """Tokens of one policy's rollouts.

    Args:
        config: The policy's, with resolved sources.
        live: Its LAMs.
        guide: Tokens of what comes next; may be exchanged between rollouts.
    """

    def __init__(self, config: DiffusionLamConfig, live: LiveTokens, guide: Guide | None) -> None:
        self.guide = guide
        self._config = config
        self._live = live
        self._clock = TickClock(config)
        self._sizes_compared = False
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new episode begins."""
        self._history: dict[str, FrameHistory] | None = None  # of each camera that a LAM looks at
        self._has_lam: bool | None = None  # found out when it matters
        self._tick = 0  # tick of the rollout, which is also the guide's frame
        self._clock.reset()

    def tick(self, batch: dict[str, Any], predicts: bool) -> Tensor | None:
        """Return the tokens of one tick; must be called at every tick.

        Args:
            batch: The observation.
            predicts: Whether a chunk of actions is about to be predicted.

        Returns:
            The token of this tick `(B, n·a)`, those of all offsets `(B, lam_conditioning_steps, n·a)`, or
            None if none are needed.
        """
        tokens = self._given_tokens(batch)
        if tokens is not None:
            self._history = None  # this tick's frames are not kept: a later pair must not bridge the gap
        else:
            self._clock.tick()
            if self._config.past_token_deltas and (self._config.lam_missing == "error" or self.has_lam()):
                self._remember_frames(batch)
            if predicts:
                self._clock.predict()
                tokens = self._window(batch)
        self._tick += 1
        return tokens

    def chunk(self, batch: dict[str, Any]) -> Tensor:
        """Tokens `(B, lam_conditioning_steps, n·a)` of a chunk of actions, executed before the next."""
        tokens = self._window(batch)
        self._tick += self._config.n_action_steps
        return tokens

    def has_lam(self) -> bool:
        """Whether there is a LAM at all; checked once between resets. A LAM that does not fit is an error."""
        if self._has_lam is None:
            try:
                self._has_lam = bool(self._live.lams)
            except LamNotFoundError as error:
                logger.warning("Acting without LAM tokens, as lam_missing=zero says: %s", error)
                self._has_lam = False
        return self._has_lam

    def _given_tokens(self, batch: dict[str, Any]) -> Tensor | None:
        """Tokens that need neither LAM nor guide: the batch's own, or zeros to act without."""
        config = self._config
        key, token_dim, steps = config.lam_tokens_key, config.lam_token_dim, len(config.lam_token_deltas)
        if key in batch:
            tokens = batch[key]
            expected, meaning = [steps, token_dim], "tokens of all lam_token_offsets"
            if config.lam_token_offsets is None or (steps == 1 and tokens.ndim == 2):
                expected, meaning = [token_dim], "token of this tick"
            if list(tokens.shape[1:]) != expected:
                raise TrainingError(
                    f"LAM tokens {key!r} have shape {tuple(tokens.shape)}, expected "
                    f"(B, {', '.join(map(str, expected))}): the {meaning} for each environment"
                )
            return tokens
        if not config.future_token_deltas and config.lam_missing == "zero" and not self.has_lam():
            return self.zeros(batch, 1)[:, 0]
        return None

    def _remember_frames(self, batch: dict[str, Any]) -> None:
        """Keep this tick's frames for the tokens of what has happened."""
        if self._history is None:
            self._history = {live.camera_key: FrameHistory(self._config) for live in self._live.lams}
        frames = raw_frames(self._config, batch)
        self._compare_sizes(frames)
        for camera, seen in frames.items():
            self._history[camera].append(seen)

    def _window(self, batch: dict[str, Any]) -> Tensor:
        """Conditioning tokens `(B, lam_conditioning_steps, n·a)` of this tick."""
        config = self._config
        past, future = config.past_token_deltas, config.future_token_deltas
        may_lack = config.lam_missing == "zero"
        parts = []
        if past and self._history is not None:
            parts.append(self._live.newest(self._history))
        elif past and may_lack:
            parts.append(self.zeros(batch, len(past)))
        elif past:
            raise TrainingError(
                "a chunk of actions was asked for outside of select_action, which keeps the frames that "
                f"tokens of lam_token_offsets={past} are made of: call select_action each tick, or pass "
                f"tokens (B, {len(past) + len(future)}, {config.lam_token_dim}) under "
                f"{config.lam_tokens_key!r}"
            )
        if future and self.guide is not None:
            state = batch[OBS_STATE]
            parts.append(self.guide.window(self._tick, future, len(state)).to(state.device))
            self.guide.compare(batch)
        elif future and may_lack:
            parts.append(self.zeros(batch, len(future)))
        elif future:
            raise TrainingError(
                f"this policy acts on tokens of what comes next (lam_token_offsets={future}), which no "
                "camera sees: pass --policy.lam_guidance=<video, or STORE#episode>, or "
                "--policy.lam_missing=zero to act without (trained with --policy.lam_token_dropout)"
            )
        return torch.cat(parts, dim=1)

    def zeros(self, batch: dict[str, Any], steps: int) -> Tensor:
        """Missing tokens `(B, steps, n·a)` of a batch."""
        state = batch[OBS_STATE]
        return torch.zeros(len(state), steps, self._config.lam_token_dim, device=state.device)

    def _compare_sizes(self, frames: dict[str, Tensor]) -> None:
        """Warn once of a camera whose frames have another size than those of the training dataset."""
        if self._sizes_compared:
            return
        self._sizes_compared = True
        for source in self._config.token_sources:
            height, width = frames[str(source.camera_key)].shape[-2:]
            if source.frame_size not in (None, f"{height}x{width}"):
                logger.warning(
                    "The frames of the LAM's camera %r are %dx%d (height x width), those of the training "
                    "dataset were %s: the LAM gives other tokens for them. Set the camera, or the "
                    "environment, to the size of the dataset.",
                    source.camera_key, height, width, source.frame_size,
                )  # fmt: skip
