"""The frames, states and episodes that a LAM is fitted to, and their division."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.utils.errors import LamError

MOVING_LEVELS = 20
"""A pixel moves if a colour changes by more than this, of 255: above what video compression flickers."""


@dataclass(frozen=True)
class FitData:
    """Frames in order, episode after episode.

    Args:
        frames: uint8 (F, 3, R, R), resized to the model's resolution; may lie on disk.
        episodes: int64 (F,), the episode of each frame.
        states: float32 (F, S), or None where the data have none.
        frame_stride: gap of a pair, in frames.
        holdout_episodes: how many of the last episodes are kept out of the fit.
        source: Identifies the frames: a fit is resumed on the same ones only.

    Raises:
        LamError: if either side has no pair of frames.
    """

    frames: Tensor
    episodes: Tensor
    states: Tensor | None
    frame_stride: int = 1
    holdout_episodes: int = 5
    source: str = ""

    def __post_init__(self) -> None:
        episodes = self.episodes.unique_consecutive()
        if not 1 <= self.holdout_episodes < len(episodes):
            raise LamError(
                f"{self.holdout_episodes} of {len(episodes)} episodes would be held out, expected at least 1 "
                "held out and at least 1 left to fit. Use more episodes or set holdout_episodes."
            )
        for name, pairs in (("fitted to", self.fit_pairs()), ("held out", self.holdout_pairs())):
            if not len(pairs):
                raise LamError(
                    f"The episodes {name} hold no pair of frames {self.frame_stride} apart, expected longer "
                    "episodes. Use a smaller frame_stride or other episodes."
                )

    def summary(self) -> dict[str, Any]:
        """What a checkpoint records of the data."""
        pairs = len(self.fit_pairs())
        return {
            "frames": len(self.episodes),
            "stride": self.frame_stride,
            "pairs": pairs,
            "source": self.source,
        }

    def fit_pairs(self) -> Tensor:
        """int64: the later frame of every pair to fit."""
        return self._pairs(heldout=False)

    def holdout_pairs(self) -> Tensor:
        """int64: the later frame of every held-out pair."""
        return self._pairs(heldout=True)

    def _pairs(self, heldout: bool) -> Tensor:
        stride = self.frame_stride
        later = torch.arange(stride, len(self.episodes))
        later = later[self.episodes[later] == self.episodes[later - stride]]
        first_heldout = self.episodes.unique_consecutive()[-self.holdout_episodes :]
        return later[torch.isin(self.episodes[later], first_heldout) == heldout]

    def pair_frames(self, later: Tensor) -> tuple[Tensor, Tensor]:
        """The earlier and the later frames of pairs, uint8 (B, 3, R, R) each."""
        return self.frames[later - self.frame_stride], self.frames[later]

    def state_changes(self, later: Tensor) -> Tensor:
        """float32 (B, S): change of the state over pairs."""
        assert self.states is not None
        return self.states[later] - self.states[later - self.frame_stride]


def moving_axes(*changes: Tensor) -> Tensor:
    """Which axes vary in each of `changes` (·, S): bool (S,)."""
    return torch.stack([each.amax(0) - each.amin(0) > 1e-9 for each in changes]).all(0)


def moving_pixels(prev: Tensor, cur: Tensor) -> Tensor:
    """uint8 (B, 3, R, R) each → bool (B, R, R): where any colour changes visibly."""
    return (prev.int() - cur.int()).abs().amax(dim=1) > MOVING_LEVELS
