"""Demonstration videos: any file that FFmpeg reads → frames at a constant rate → a track of tokens.

Several become a token store whose episodes they are, in order.

A track follows the store's rule: token(i) = LAM(frame i - stride, frame i), zeros for the first `stride`
frames. The frame at time t is the one that a player shows then: the latest that is due. Each frame is due
half a frame early, so that at a constant rate it is the nearest one, whatever the container's rounding.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lerobot_lam_diffusion.constants import VIDEO_SUFFIXES
from lerobot_lam_diffusion.precompute.dataset import codebook_of, describe_tokens
from lerobot_lam_diffusion.precompute.encode import PairEncoder
from lerobot_lam_diffusion.precompute.frames import CHUNK_BYTES, CHUNK_FRAMES
from lerobot_lam_diffusion.precompute.pairs import episode_pairs, rebatch
from lerobot_lam_diffusion.precompute.pipeline import ResizeOnDevice
from lerobot_lam_diffusion.tokens.provenance import VIDEOS, DatasetInfo
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.writer import write_store
from lerobot_lam_diffusion.utils.errors import DatasetError, UserError, first_line

PAIRS_AT_A_TIME = 16
"""Batch size of both guidance and video stores, so that even their continuous tokens are equal."""

VIDEO_CAMERA = "video"

_EARLY_END_S = 0.5  # a stream may end so long before its header says so
_SECONDS = re.compile(r"t=(?:npt:)?(\d+(?:\.\d*)?|\.\d+)?(?:,(\d+(?:\.\d*)?|\.\d+))?")


@dataclass
class Look:
    """What a video looks like, gathered while it is read.

    Attributes:
        height, width: As shown.
        rate: Its own frames per second, on average.
        levels: Sum over all frames of the mean level of R, G, B.
        frames: How many frames those are.
    """

    height: int = 0
    width: int = 0
    rate: float = 0.0
    levels: np.ndarray = field(default_factory=lambda: np.zeros(3))
    frames: int = 0

    @property
    def mean_levels(self) -> list[float]:
        """Mean level of R, G, B, 0..255."""
        return (self.levels / max(self.frames, 1)).tolist()


@dataclass
class DemonstrationVideo:
    """A video file, or a part of it, resampled.

    Args:
        path: The file.
        start: Start of the part, in seconds from the first frame.
        end: End of the part; None: the end of the file.
        look: Look of the frames read so far.
    """

    path: Path
    start: float = 0.0
    end: float | None = None
    look: Look = field(default_factory=Look)

    @classmethod
    def parse(cls, text: str) -> "DemonstrationVideo":
        """`demo.mp4`, or a part of it as a W3C media fragment in seconds: `demo.mp4#t=1.5,9`, `#t=,9`.

        Raises:
            DatasetError: there is no such file, or the fragment says something else.
        """
        name, _, fragment = text.rpartition("#")
        if not name or Path(text).expanduser().is_file():  # no fragment: `#` may be in a file's name
            name, fragment = text, ""
        path = Path(name).expanduser()
        if not path.is_file():
            raise DatasetError(f"{name}: there is no such file; correct the path of the video")
        if not fragment:
            return cls(path)
        times = _SECONDS.fullmatch(fragment)
        if times is None or times.groups() == (None, None):
            raise DatasetError(
                f"{text}: #{fragment} is not a part of a video; expected seconds, as in {name}#t=1.5,9"
            )
        start, end = float(times[1] or 0), None if times[2] is None else float(times[2])
        if end is not None and end <= start:
            raise DatasetError(
                f"{text}: the part ends at {end:g} s, not after its start {start:g} s; swap them"
            )
        return cls(path, start, end)

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        if not self.start and self.end is None:
            return str(self.path)
        return f"{self.path}#t={self.start:g}" + ("" if self.end is None else f",{self.end:g}")

    def digest(self) -> str:
        """SHA-256 of the file and the part."""
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(f"#t={self.start!r},{self.end!r}".encode())
        return digest.hexdigest()

    def chunks(self, fps: float) -> Iterator[Tensor]:
        """Chunks of its frames at `fps`, uint8 `(T, 3, H, W)`, as displayed: a phone's rotation is applied.

        A chunk holds at most `CHUNK_FRAMES` frames and `CHUNK_BYTES` bytes, whatever the video's length.

        Raises:
            DatasetError: not a video, damaged, or its pictures change their size.
        """
        self.look = Look()
        waiting: list[np.ndarray] = []
        for picture in self._resampled(fps):
            if waiting and picture.shape != waiting[0].shape:
                raise DatasetError(
                    f"{self.name}: its frames change size from {_size(waiting[0])} to {_size(picture)}; "
                    "cut or re-encode it to one size"
                )
            waiting.append(picture)
            self.look.height, self.look.width = picture.shape[:2]
            self.look.levels += picture.mean((0, 1))
            self.look.frames += 1
            if len(waiting) >= max(1, min(CHUNK_FRAMES, CHUNK_BYTES // picture.nbytes)):
                yield _stacked(waiting)
                waiting = []
        if waiting:
            yield _stacked(waiting)

    def _resampled(self, fps: float) -> Iterator[np.ndarray]:
        """RGB pictures `(H, W, 3)` at `start`, `start + 1 / fps`, …"""
        taken = 0
        picture: np.ndarray | None = None
        due = self.start
        for begins, ends, frame in self._shown():
            if self.end is not None and begins >= self.end - 1e-6:
                return
            stop = ends if self.end is None else min(ends, self.end)
            picture = None
            while due < stop - 1e-6:
                if picture is None:
                    picture = _upright(frame)
                yield picture
                taken += 1
                due = self.start + taken / fps

    def _shown(self) -> Iterator[tuple[float, float, av.VideoFrame]]:
        """Each frame and from when to when it is shown, in seconds from the first frame."""
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise DatasetError(f"{self.path} has no video; name a video file")
                stream = container.streams.video[0]
                if stream.codec_context is None:  # PyAV would crash
                    raise ValueError("FFmpeg finds no codec for it")
                stream.thread_type = "AUTO"
                rate = float(stream.average_rate or stream.base_rate or 0)
                self.look.rate = rate
                time_base = stream.time_base or Fraction(1, 90000)
                half = 0.5 / rate if rate > 0 else 0.0
                before: tuple[float, float, av.VideoFrame] | None = None  # its time, from when it is shown
                first, time = None, 0.0
                for frame in container.decode(stream):
                    if frame.pts is None:
                        continue
                    seconds = float(frame.pts * time_base)
                    first = seconds if first is None else first
                    time = seconds - first
                    if before is None:
                        before = (time, -1.0, frame)
                        continue
                    # Half a frame early, but never past the middle between two frames.
                    switch = time - min(half, (time - before[0]) / 2)
                    yield before[1], switch, before[2]
                    before = (time, switch, frame)
                if before is None:
                    raise DatasetError(f"{self.path} has no frames; name another video")
                self._refuse_early_end(stream, time, 2 * half)
                yield before[1], before[0] + half, before[2]
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise DatasetError(
                f"{self.path} cannot be read as a video ({first_line(error)}); it may be damaged or cut "
                "off: play it to the end, copy it again, or re-encode it (ffmpeg -i IN OUT.mp4)"
            ) from error

    def _refuse_early_end(self, stream: Any, last: float, frame_s: float) -> None:
        """A file that was cut off often decodes without an error, up to where its data ends."""
        declared = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        if stream.frames > 1 and last + frame_s < declared - max(_EARLY_END_S, 2 * frame_s):
            raise DatasetError(
                f"{self.path} ends after {last + frame_s:.1f} s, its header says {declared:.1f} s: it was "
                "cut off. Copy it again, or re-encode what is left of it (ffmpeg -i IN OUT.mp4)"
            )


def encode_video(
    video: DemonstrationVideo,
    lam: Any,
    fps: float,
    frame_stride: int,
    use_vq_tokens: bool,
    batch_size: int = PAIRS_AT_A_TIME,
    advance: Callable[[int], object] = lambda frames: None,
) -> tuple[Tensor, int]:
    """Encode a video into the values that a store keeps.

    Args:
        lam: What `load_lam` returns.
        fps: Frames per second of the tokens.
        frame_stride: Offset between the two frames of a pair, in frames at `fps`.
        use_vq_tokens: Code indices, or the vectors before quantisation.
        advance: Called with the number of frames that were read.

    Returns:
        Values of the frames that have a token, `(T - stride, n)` int64 or `(T - stride, n·a)` float32 on the
        CPU, and the number of frames T.

    Raises:
        DatasetError: as `DemonstrationVideo.chunks`; or it has no pair of frames.
    """
    resize = ResizeOnDevice(lam)

    def small_chunks() -> Iterator[Tensor]:
        for chunk in video.chunks(fps):
            advance(len(chunk))
            yield resize(chunk)

    encoder = PairEncoder(lam, batch_size, use_vq_tokens)
    pairs = rebatch(episode_pairs(small_chunks(), 0, frame_stride), batch_size)
    values = [encoder(batch) for batch in pairs]
    frames = video.look.frames
    if not values:
        raise DatasetError(
            f"{video.name} has {frames} frame{'' if frames == 1 else 's'} at {fps:g} fps, too few for one "
            f"pair of frames {frame_stride} apart; name a video of at least {(frame_stride + 1) / fps:.2g} s"
        )
    return torch.cat(values), frames


def precompute_videos(
    videos: Sequence[DemonstrationVideo],
    lam: Any,
    output_dir: Path,
    *,
    fps: float,
    camera_key: str = VIDEO_CAMERA,
    lam_path: str,
    frame_stride: int = 1,
    use_vq_tokens: bool = True,
    storage_dtype: str = "",
    batch_size: int = PAIRS_AT_A_TIME,
    show_progress: bool = True,
) -> TokenStore:
    """Encode all frame pairs of videos; episode k of the store guides a policy as the k-th video would.

    The tokens of all of them are in memory until the store is written (a VQ token takes `n` bytes), frames
    only a chunk at a time.

    Args:
        fps: Frames per second of the tokens, to which each video is resampled.
        camera_key: What to call the camera; recorded.
        batch_size: Pairs per batch; a value other than guidance's changes continuous tokens by rounding.

    Raises:
        DatasetError: a video cannot be read, or has no pair of frames; nothing is written then.
        FileExistsError: something exists at `output_dir` already.
    """
    blocks: list[Tensor] = []
    lengths: list[int] = []
    with tqdm(unit="frame", desc="LAM tokens", disable=not show_progress) as bar:
        for video in videos:
            values, frames = encode_video(
                video, lam, fps, frame_stride, use_vq_tokens, batch_size, bar.update
            )
            if use_vq_tokens:
                values = values.to(torch.int16 if lam.num_codes <= 1 << 15 else torch.int32)
            missing = values.new_zeros(frame_stride, values.shape[1])
            blocks.append(torch.cat([missing, values]))
            lengths.append(frames)
    ends = torch.tensor(list(accumulate(lengths)))
    digest = hashlib.sha256(f"{fps!r}".encode())
    for video in videos:
        digest.update(video.digest().encode())
    named = videos[0].path.stem if len(videos) == 1 else videos[0].path.resolve().parent.name
    dataset = DatasetInfo(
        repo_id=f"{VIDEOS}{named}",
        revision=None,
        total_frames=sum(lengths),
        total_episodes=len(lengths),
        fps=fps,
        digest=digest.hexdigest(),
    )
    provenance = describe_tokens(
        dataset,
        lam,
        camera_key=camera_key,
        lam_path=lam_path,
        frame_stride=frame_stride,
        use_vq_tokens=use_vq_tokens,
        storage_dtype=storage_dtype,
        decoder="pyav",
    )
    covered = torch.ones(len(lengths), dtype=torch.bool)
    return write_store(
        output_dir, provenance, blocks, codebook_of(lam), ends - torch.tensor(lengths), ends, covered
    )


def videos_in(text: str) -> list[DemonstrationVideo]:
    """The video that `text` names (see `DemonstrationVideo.parse`), or those in the folder, sorted.

    Raises:
        DatasetError: none there.
    """
    folder = Path(text).expanduser()
    if not folder.is_dir():
        return [DemonstrationVideo.parse(text)]
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    )
    if not files:
        raise DatasetError(
            f"{folder} has no videos in it; expected files such as demo.mp4 ({' '.join(VIDEO_SUFFIXES)})"
        )
    return [DemonstrationVideo(path) for path in files]


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB `(H, W, 3)`, turned as its display matrix says (counter-clockwise degrees)."""
    picture = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def _stacked(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]} × {picture.shape[0]}"
