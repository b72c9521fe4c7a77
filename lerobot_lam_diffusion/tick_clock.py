"""Whether a robot runs a policy at the rate of its training dataset.

A stride is kept in frames, so frames that come at another rate give pairs that are further apart, or nearer,
than those that the policy was trained on. Only ticks of `lerobot-rollout` are measured: simulators run as
fast as they can.
"""

import itertools
import logging
import sys
import time
from collections import deque
from statistics import median

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig

logger = logging.getLogger(__name__)

TICKS = 20
"""Intervals of which the median counts."""
DEVIATION = 1.2
"""A rate that is so many times higher or lower than the dataset's is told."""
STALLED = 1.5
"""A frame pair that is so many times further apart than in training straddles a stall."""
STALLED_CHUNKS = 3


def drives_a_robot() -> bool:
    """Whether this process is a `lerobot-rollout`, whose ticks are a robot's."""
    return "lerobot.rollout" in sys.modules


class TickClock:
    """Measures the ticks of one policy, and warns once of each thing that is wrong with them."""

    def __init__(self, config: DiffusionLamConfig) -> None:
        self._config = config
        self._times: deque[float] = deque(maxlen=TICKS + 1)
        self._chunks = 0
        self._stalled = 0
        self._rate_told = False
        self._stall_told = False

    def reset(self) -> None:
        """Forget the ticks: what comes next is another episode."""
        self._times.clear()

    def tick(self, now: float | None = None) -> None:
        """A frame has come, at `now` seconds (of the monotonic clock)."""
        if now is None:
            if not drives_a_robot():
                return
            now = time.perf_counter()
        self._times.append(now)
        fps = self._config.lam_fps
        if fps is None or self._rate_told or len(self._times) <= TICKS:
            return
        times = list(self._times)
        rate = 1 / max(median(b - a for a, b in itertools.pairwise(times)), 1e-6)
        if not fps / DEVIATION < rate < fps * DEVIATION:
            self._rate_told = True
            logger.warning(
                "The robot runs at %.3g frames a second, the policy was trained on %g: its frame pairs are "
                "%.3g s apart instead of %.3g s, and their tokens mean other motion. Pass --fps=%g%s.",
                rate, fps, self._stride / rate, self._stride / fps, fps,
                " to lerobot-rollout" if rate > fps
                else "; if that is set already, this computer or a camera is too slow for it",
            )  # fmt: skip

    def predict(self) -> None:
        """A chunk of actions is about to be predicted, from the tokens of the last ticks."""
        fps, times = self._config.lam_fps, list(self._times)
        spans = [
            times[-1 - back] - times[-1 - back - self._stride]
            for back in range(len(self._config.lam_token_deltas))
            if len(times) > back + self._stride
        ]
        if fps is None or not spans or self._rate_told or self._stall_told:
            return
        self._chunks += 1
        self._stalled += max(spans) > STALLED * self._stride / fps
        if self._stalled >= STALLED_CHUNKS and self._stalled > self._chunks / 4:
            self._stall_told = True
            logger.warning(
                "%d of %d action chunks were predicted from frames that are further apart than in training "
                "(the last ones %.3g s instead of %.3g s): a tick that predicts a chunk takes so long that "
                "the frame pair of the next one lies around it. Keep lam_frame_stride (and the tokens of "
                "concat) below n_action_steps, here %d, or predict faster: fewer "
                "--policy.num_inference_steps, a smaller LAM, a GPU.",
                self._stalled, self._chunks, max(spans), self._stride / fps, self._config.n_action_steps,
            )  # fmt: skip

    @property
    def _stride(self) -> int:
        return self._config.lam_frame_stride or 1
