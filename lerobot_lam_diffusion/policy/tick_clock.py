"""Checks that a robot runs a policy at the rate of its training dataset.

A stride counts frames, so at another rate the frames of a pair are further apart, or nearer, than in
training. Only `lerobot-rollout` is measured: simulators run as fast as they can.
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
"""Number of intervals whose median counts."""
DEVIATION = 1.2
"""Ratio to the dataset's rate, up or down, that triggers a warning."""
STALLED = 1.5
"""Ratio to the stride in training from which on a frame pair straddles a stall."""
STALLED_CHUNKS = 3


def drives_a_robot() -> bool:
    """Whether this process is a `lerobot-rollout`, whose ticks are a robot's."""
    return "lerobot.rollout" in sys.modules


class TickClock:
    """Measures the ticks of one policy, and warns once of each problem."""

    def __init__(self, config: DiffusionLamConfig) -> None:
        self._config = config
        self._times: deque[float] = deque(maxlen=TICKS + 1)
        self._chunks = 0
        self._stalled = 0
        self._warned_of_rate = False
        self._warned_of_stalls = False

    def reset(self) -> None:
        """Forget the ticks: a new episode begins."""
        self._times.clear()

    def tick(self, now: float | None = None) -> None:
        """A frame has arrived, at `now` seconds (of the monotonic clock)."""
        if now is None:
            if not drives_a_robot():
                return
            now = time.perf_counter()
        self._times.append(now)
        fps, stride = self._config.lam_fps, self._config.lam_frame_stride or 1
        if fps is None or self._warned_of_rate or len(self._times) <= TICKS:
            return
        intervals = [b - a for a, b in itertools.pairwise(self._times)]
        rate = 1 / max(median(intervals), 1e-6)
        if not fps / DEVIATION < rate < fps * DEVIATION:
            self._warned_of_rate = True
            logger.warning(
                "The robot runs at %.3g frames a second, the policy was trained on %g: its frame pairs are "
                "%.3g s apart instead of %.3g s, and their tokens describe other motion. Pass --fps=%g%s.",
                rate, fps, stride / rate, stride / fps, fps,
                " to lerobot-rollout" if rate > fps
                else "; if that is set already, this computer or a camera is too slow for it",
            )  # fmt: skip

    def predict(self) -> None:
        """A chunk of actions is about to be predicted, from the tokens of the last ticks."""
        config, times = self._config, list(self._times)
        fps, stride = config.lam_fps, config.lam_frame_stride or 1
        pairs = range(min(len(config.lam_token_deltas), len(times) - stride))
        if fps is None or not pairs or self._warned_of_rate or self._warned_of_stalls:
            return
        longest = max(times[-1 - back] - times[-1 - back - stride] for back in pairs)
        self._chunks += 1
        self._stalled += longest > STALLED * stride / fps
        if self._stalled >= STALLED_CHUNKS and self._stalled > self._chunks / 4:
            self._warned_of_stalls = True
            logger.warning(
                "%d of %d action chunks were predicted from frames that are further apart than in training "
                "(the last ones %.3g s instead of %.3g s): a tick that predicts a chunk takes so long that "
                "the frame pair of the next one straddles it. Keep lam_frame_stride (and the tokens of "
                "concat) below n_action_steps, here %d, or predict faster: fewer "
                "--policy.num_inference_steps, a smaller LAM, a GPU.",
                self._stalled, self._chunks, longest, stride / fps, config.n_action_steps,
            )  # fmt: skip
