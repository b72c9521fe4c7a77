"""Decode: the frames of an episode, exactly as `LeRobotDataset` returns them, each once and in order.

Only this module reads what the package needs from LeRobot's own classes (rows, video backend, files).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.video_utils import (
    FrameTimestampError,
    VideoDecoderCache,
    decode_video_frames_torchcodec,
)
from PIL import Image
from torch import Tensor

from lerobot_lam_diffusion.precompute.rows import rows_of
from lerobot_lam_diffusion.precompute.video import SequentialVideo, end_of
from lerobot_lam_diffusion.tokens.dataset_check import not_rgb, why_absent
from lerobot_lam_diffusion.utils.errors import DatasetError, UserError, first_line

CHUNK_FRAMES = 64
CHUNK_BYTES = 32 << 20
"""Maximum frames and bytes of a chunk, so that memory is bounded however long an episode is."""


class DecodeError(UserError):
    """Frames that cannot be read. Its message ends with a remedy, to which a command may add its flags."""


def backend_of(dataset: Any) -> str:
    """The video backend that the dataset was opened with."""
    return dataset._video_backend


def decoder_of(meta: Any, camera_key: str, video_backend: str) -> str:
    """How a dataset's files are decoded to pixels: "images", or the decoder behind LeRobot's backend."""
    if camera_key not in meta.video_keys:
        return "images"
    return "torchcodec" if video_backend == "torchcodec" else "pyav"


def choose_camera(meta: Any, camera_key: str | None) -> str:
    """The dataset's RGB camera that the LAM looks at.

    Args:
        meta: `LeRobotDatasetMetadata`.
        camera_key: Its name; None: the only one there is.

    Raises:
        UserError: no such camera, one that is not RGB, or several to choose from. Lists the RGB cameras.
    """
    others = not_rgb(meta)
    cameras = [key for key in meta.camera_keys if key not in others]
    if not cameras:
        listed = "".join(f"; {key} {why}" for key, why in others.items())
        raise DatasetError(
            f"dataset {meta.repo_id!r} has no RGB camera for the LAM to look at{listed}; use another dataset"
        )
    if camera_key is None and len(cameras) == 1:
        return cameras[0]
    if camera_key in cameras:
        return str(camera_key)
    found = others.get(str(camera_key), "is unknown")
    what = f"--camera_key={camera_key} {found}" if camera_key else "--camera_key is unset"
    raise DatasetError(
        f"{what}: dataset {meta.repo_id!r} has the RGB cameras {cameras}; pass one of them as --camera_key"
    )


class EpisodeFrames:
    """Frames of one camera of a LeRobot dataset. One for each thread: it keeps the last video file open.

    Args:
        dataset: `LeRobotDataset`, of all or some episodes.
        camera_key: An RGB camera of it, stored as video or as images.
        video_backend: "torchcodec" or "pyav"; the dataset's own if None.
    """

    def __init__(self, dataset: Any, camera_key: str, video_backend: str | None = None) -> None:
        meta = dataset.meta
        self._dataset = dataset
        self._camera_key = camera_key
        self._decoder = decoder_of(meta, camera_key, video_backend or backend_of(dataset))
        self._first_rows: dict[int, int] | None = None  # all episodes are open: rows are absolute indices
        if dataset.episodes is not None:
            opened = sorted(set(dataset.episodes))
            rows = accumulate((meta.episodes["length"][episode] for episode in opened), initial=0)
            self._first_rows = dict(zip(opened, rows, strict=False))
        self._decoders = VideoDecoderCache(max_size=1)  # LeRobot's own is shared by threads: not safe
        self._video: SequentialVideo | None = None
        self._images: Any = None
        frame_bytes = math.prod(meta.features[camera_key]["shape"])
        self._chunk_frames = max(1, min(CHUNK_FRAMES, CHUNK_BYTES // frame_bytes))

    def check(self, episodes: Iterable[int], skip_unreadable: bool = False) -> None:
        """Find problems without decoding: images that are not RGB, videos that do not open or that end early.

        Only the first image of each episode is checked.

        Args:
            skip_unreadable: Ignore unreadable files here; `chunks` raises for them.

        Raises:
            DatasetError: an image is not RGB.
            DecodeError: a file cannot be opened, or a video ends before an episode's last frame.
        """
        ends: dict[Path, float | None] = {}
        for episode in episodes:
            rows = self._rows(episode)
            try:
                if self._decoder == "images":
                    self._refuse_unfit_images(episode, rows[:1], [self._unread_image(rows[0])])
                else:
                    self._refuse_early_end(episode, rows, ends)
            except DatasetError:
                raise
            except Exception as error:  # decoders raise almost anything on damaged files
                if not skip_unreadable:
                    raise self._error(episode, 0, len(rows), error) from error

    def chunks(self, episode: int) -> Iterator[Tensor]:
        """Consecutive frames, uint8 `(T, 3, H, W)` with T at most `CHUNK_FRAMES`.

        Raises:
            DecodeError: a frame cannot be read.
        """
        rows = self._rows(episode)
        decode = self._decode_images if self._decoder == "images" else self._decode_video
        for start in range(0, len(rows), self._chunk_frames):
            chunk = rows[start : start + self._chunk_frames]
            try:
                yield decode(episode, chunk)
            except DatasetError:
                raise
            except Exception as error:  # decoders raise almost anything on damaged files
                raise self._error(episode, start, start + len(chunk), error) from error

    def _rows(self, episode: int) -> range:
        """Rows of the dataset's table."""
        bounds = self._dataset.meta.episodes[episode]
        first, end = int(bounds["dataset_from_index"]), int(bounds["dataset_to_index"])
        first_row = self._first_rows[episode] if self._first_rows else first
        return range(first_row, first_row + end - first)

    def _path(self, episode: int) -> Path:
        """The file with the frames of an episode."""
        meta = self._dataset.meta
        if self._decoder == "images":
            return self._dataset.root / meta.get_data_file_path(episode)
        return self._dataset.root / meta.get_video_file_path(episode, self._camera_key)

    def _error(self, episode: int, start: int, stop: int, error: Exception) -> DecodeError:
        path = self._path(episode)
        reason = why_absent(path)
        cause = f"it {reason}" if reason else first_line(error)
        remedy = "Fetch or repair the file"
        if isinstance(error, FrameTimestampError):
            remedy += f", or allow for more by --tolerance_s (now {self._dataset.tolerance_s:g} s)"
        return DecodeError(
            f"frames {start} to {stop - 1} of episode {episode} of dataset {self._dataset.repo_id!r} cannot "
            f"be read from {path} ({cause}). {remedy}"
        )

    def _timestamps(self, episode: int, rows: range) -> list[float]:
        # As `DatasetReader._query_videos` shifts them: a float32 column plus the episode's offset in its
        # video file.
        offset = self._dataset.meta.episodes[episode][f"videos/{self._camera_key}/from_timestamp"]
        seconds = rows_of(self._dataset).column("timestamp").slice(rows.start, len(rows)).to_numpy()
        return [offset + float(t) for t in seconds]

    def _decode_video(self, episode: int, rows: range) -> Tensor:
        timestamps = self._timestamps(episode, rows)
        path = self._path(episode)
        if self._decoder == "torchcodec":
            return decode_video_frames_torchcodec(
                path, timestamps, self._dataset.tolerance_s, decoder_cache=self._decoders, return_uint8=True
            )
        if self._video is None or self._video.path != path:
            self._close()
            self._video = SequentialVideo(path)
        try:
            return self._video.frames(timestamps, self._dataset.tolerance_s)
        except BaseException:
            self._close()  # its position is not known any more
            raise

    def _close(self) -> None:
        if self._video is not None:
            self._video.close()
            self._video = None

    def _refuse_early_end(self, episode: int, rows: range, ends: dict[Path, float | None]) -> None:
        path = self._path(episode)
        (last,) = self._timestamps(episode, rows[-1:])
        if path not in ends:
            ends[path] = end_of(path)
        end = ends[path]
        if end is not None and last > end + self._dataset.tolerance_s:
            raise ValueError(
                f"it ends at {end:.3f} s, and by meta/episodes the episode's last frame is at {last:.3f} s"
            )

    def _decode_images(self, episode: int, rows: range) -> Tensor:
        if self._images is None:  # a view costs more than the frames of a short episode
            self._images = self._dataset.hf_dataset.select_columns([self._camera_key]).with_format(None)
        images = self._images[rows.start : rows.stop][self._camera_key]
        self._refuse_unfit_images(episode, rows, images)
        return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)

    def _unread_image(self, row: int) -> Image.Image:
        """An image whose header alone is read."""
        stored = rows_of(self._dataset).column(self._camera_key).slice(row, 1)[0].as_py()
        return Image.open(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"]))

    def _refuse_unfit_images(self, episode: int, rows: range, images: Sequence[Image.Image]) -> None:
        """Whatever `info.json` says of the camera, the files decide."""
        sizes = sorted({image.size for image in images})
        if len(sizes) > 1:
            (a, b), (c, d) = sizes[:2]
            raise ValueError(f"its images have different sizes, {a} x {b} and {c} x {d} pixels")
        for row, image in zip(rows, images, strict=True):
            if image.mode != "RGB":
                raise DatasetError(
                    f"frame {row - self._rows(episode).start} of episode {episode} of dataset "
                    f"{self._dataset.repo_id!r}, camera {self._camera_key}, is an image of mode {image.mode} "
                    f"({len(image.getbands())} channels), and a LAM looks at RGB. Convert the dataset's "
                    "images to RGB, or name another camera"
                )
