"""Video files as phones, cameras and accidents make them."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray],
    fps: int,
    codec: str = "ffv1",
    pix_fmt: str = "bgr0",
    times: Sequence[float] | None = None,
    audio: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """A video of RGB pictures `(H, W, 3)`; without more words lossless.

    Args:
        times: When each picture is shown, in seconds; None: at `fps`.
        audio: With a track of silence.
    """
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=8000) if audio else None
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 8000, 0
            container.mux(sound.encode(silence))
        for k, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[k] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            container.mux(sound.encode(None))
    return path


def turn(path: Path) -> Path:
    """Mark an MP4 as a phone held upright does: to be shown a quarter turn clockwise.

    The matrix in its track header is that of an iPhone's portrait video.
    """
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    version = data[header]
    matrix = header + (52 if version == 1 else 40)
    upright = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    assert data[matrix : matrix + 36] == upright
    data[matrix : matrix + 36] = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(data)
    return path
