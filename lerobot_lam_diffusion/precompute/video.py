"""One video file read from front to back with PyAV, picking the frames that LeRobot's random access picks.

LeRobot opens the file, seeks and decodes for every request (`decode_video_frames_pyav`); here a file stays
open and each of its frames is decoded once: 5 to 40 x as fast, depending on the frames' size.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from lerobot.datasets.video_utils import FrameTimestampError
from torch import Tensor

SEEK_AHEAD_S = 2.0
"""Up to this far ahead, the frames in between are decoded and dropped; farther ahead, it seeks."""


def end_of(path: Path) -> float | None:
    """When a video ends, in seconds, by its header alone; None: it does not say.

    Raises:
        av.error.FFmpegError: no video there.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        start, duration, time_base = stream.start_time or 0, stream.duration, stream.time_base
    return None if duration is None or time_base is None else float((start + duration) * time_base)


type _Frame = tuple[float, av.VideoFrame]  # with its time in seconds


class SequentialVideo:
    """A video file and the position in it.

    Raises:
        av.error.FFmpegError: no video there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container = av.open(str(path))
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # files are read in parallel, not the parts of a frame
        self._time_base = self._stream.time_base or Fraction(1)
        self._decoded = self._container.decode(self._stream)
        self._before: _Frame | None = None
        self._here: _Frame | None = None
        self._ended = False

    def frames(self, timestamps: Sequence[float], tolerance_s: float) -> Tensor:
        """The frames nearest to `timestamps`, uint8 `(T, 3, H, W)`.

        Args:
            timestamps: In seconds, ascending; going back, or far ahead, costs a seek.
            tolerance_s: How far a frame may lie from its timestamp.

        Raises:
            FrameTimestampError: no frame is that near.
            av.error.FFmpegError: the file is damaged.
        """
        pictures = [self._nearest(timestamp, tolerance_s) for timestamp in timestamps]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def close(self) -> None:
        self._container.close()

    def _nearest(self, timestamp: float, tolerance_s: float) -> np.ndarray:
        self._advance_to(timestamp)
        candidates = [found for found in (self._before, self._here) if found is not None]
        # float32, and the first on ties, as LeRobot compares them.
        distances = [abs(np.float32(timestamp) - np.float32(seconds)) for seconds, _ in candidates]
        nearest = int(np.argmin(distances)) if candidates else 0
        if not candidates or not distances[nearest] < tolerance_s:
            at = f"the nearest is at {candidates[nearest][0]:.4f} s" if candidates else "there are no more"
            raise FrameTimestampError(f"no frame within {tolerance_s:g} s of {timestamp:.4f} s: {at}")
        return candidates[nearest][1].to_ndarray(format="rgb24")

    def _advance_to(self, timestamp: float) -> None:
        """Make `_here` the first frame at or after `timestamp` and `_before` the one before it."""
        known = [found[0] for found in (self._before, self._here) if found is not None] or [0.0]
        if self._ended or not known[0] <= timestamp <= known[-1] + SEEK_AHEAD_S:
            self._seek(timestamp)
        while not self._ended and (self._here is None or self._here[0] < timestamp):
            self._step()

    def _step(self) -> None:
        for frame in self._decoded:
            if frame.pts is not None:
                self._before, self._here = self._here, (float(frame.pts * self._time_base), frame)
                return
        self._before, self._here, self._ended = self._here or self._before, None, True

    def _seek(self, timestamp: float) -> None:
        """To the keyframe before `timestamp`, as LeRobot does."""
        ticks = round(timestamp / self._time_base) - 1
        self._container.seek(ticks, backward=True, any_frame=False, stream=self._stream)
        self._decoded = self._container.decode(self._stream)
        self._before, self._here, self._ended = None, None, False
