"""Decode: the frames of an episode, the very ones that `LeRobotDataset` returns, each once and in order."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.video_utils import VideoDecoderCache, decode_video_frames_torchcodec
from torch import Tensor

from lerobot_lam_diffusion.precompute.video import SequentialVideo
from lerobot_lam_diffusion.problems import DatasetError, UserError

CHUNK_FRAMES = 64
CHUNK_BYTES = 32 << 20
"""A chunk holds at most so many frames and bytes: memory is bounded whatever an episode's length."""


class DecodeError(UserError):
    """An episode whose frames cannot be read."""

    section = "datasets-and-cameras"


def choose_camera(meta: Any, camera_key: str | None) -> str:
    """The dataset's RGB camera that the LAM looks at.

    Args:
        meta: `LeRobotDatasetMetadata`.
        camera_key: Its name; None: the only one there is.

    Raises:
        UserError: no such camera, a depth camera, or several to choose from. Lists the cameras.
    """
    cameras = [key for key in meta.camera_keys if key not in meta.depth_keys]
    if not cameras:
        raise DatasetError(
            f"dataset {meta.repo_id!r} has no RGB camera for the LAM to look at; use another dataset"
        )
    if camera_key is None and len(cameras) == 1:
        return cameras[0]
    if camera_key is not None and camera_key in cameras:
        return camera_key
    found = "is a depth camera" if camera_key in meta.depth_keys else "is unknown"
    what = f"--camera_key={camera_key} {found}" if camera_key else "--camera_key is unset"
    raise DatasetError(
        f"{what}: dataset {meta.repo_id!r} has the RGB cameras {cameras}; pass one of them as --camera_key"
    )


def decoder_of(meta: Any, camera_key: str, video_backend: str) -> str:
    """The way from a dataset's files to pixels: "images", or the decoder behind LeRobot's backend."""
    if camera_key not in meta.video_keys:
        return "images"
    return "torchcodec" if video_backend == "torchcodec" else "pyav"


class EpisodeFrames:
    """Frames of one camera of a LeRobot dataset. One for each thread: it keeps the last video file open.

    Args:
        dataset: `LeRobotDataset`, of all or some episodes.
        camera_key: An RGB camera of it, kept as video or as images.
        video_backend: "torchcodec" or "pyav"; the dataset's own if None.
    """

    def __init__(self, dataset: Any, camera_key: str, video_backend: str | None = None) -> None:
        self._dataset = dataset
        self._camera_key = camera_key
        self._is_video = camera_key in dataset.meta.video_keys
        self._decoder = decoder_of(dataset.meta, camera_key, video_backend or dataset._video_backend)
        self._first_rows = _first_rows(dataset)
        self._decoders = VideoDecoderCache(max_size=1)  # LeRobot's own is shared by threads: not safe
        self._open: SequentialVideo | None = None
        self._pictures: Any = None
        height, width = dataset.meta.features[camera_key]["shape"][:2]
        self._chunk_frames = max(1, min(CHUNK_FRAMES, CHUNK_BYTES // (3 * height * width)))

    def chunks(self, episode: int) -> Iterator[Tensor]:
        """Consecutive frames, uint8 `(T, 3, H, W)` with T at most `CHUNK_FRAMES`.

        Raises:
            DecodeError: a frame cannot be read.
        """
        bounds = self._dataset.meta.episodes[episode]
        length = bounds["dataset_to_index"] - bounds["dataset_from_index"]
        first_row = self._first_rows[episode] if self._first_rows else bounds["dataset_from_index"]
        for start in range(0, length, self._chunk_frames):
            stop = min(start + self._chunk_frames, length)
            rows = range(first_row + start, first_row + stop)
            try:
                yield self._video(bounds, episode, rows) if self._is_video else self._images(rows)
            except Exception as error:  # decoders raise almost anything on damaged files
                raise DecodeError(
                    f"frames {start} to {stop - 1} of episode {episode} of dataset {self._dataset.repo_id!r} "
                    f"cannot be read from {self._file(episode)} ({_reason(error)}). Fetch or repair the "
                    "file, or pass --on_error=skip to record such episodes as missing"
                ) from error

    def _video(self, bounds: dict, episode: int, rows: range) -> Tensor:
        # Timestamps as `DatasetReader._query_videos` shifts them: a float32 column plus the episode's offset
        # in its video file.
        offset = bounds[f"videos/{self._camera_key}/from_timestamp"]
        seconds = self._dataset.hf_dataset.data.column("timestamp").slice(rows.start, len(rows)).to_numpy()
        timestamps = [offset + float(t) for t in seconds]
        path = self._file(episode)
        if self._decoder == "torchcodec":
            return decode_video_frames_torchcodec(
                path, timestamps, self._dataset.tolerance_s, decoder_cache=self._decoders, return_uint8=True
            )
        if self._open is None or self._open.path != path:
            self._close()
            self._open = SequentialVideo(path)
        try:
            return self._open.frames(timestamps, self._dataset.tolerance_s)
        except BaseException:
            self._close()  # its position is not known any more
            raise

    def _images(self, rows: range) -> Tensor:
        if self._pictures is None:  # a view costs more than the frames of a short episode
            self._pictures = self._dataset.hf_dataset.select_columns([self._camera_key]).with_format(None)
        pixels = [np.asarray(picture) for picture in self._pictures[rows.start : rows.stop][self._camera_key]]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def _file(self, episode: int) -> Path:
        """Where the episode's frames lie."""
        meta = self._dataset.meta
        if self._is_video:
            return self._dataset.root / meta.get_video_file_path(episode, self._camera_key)
        return self._dataset.root / meta.get_data_file_path(episode)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _first_rows(dataset: Any) -> dict[int, int] | None:
    """First row of each opened episode in `hf_dataset`; None: all are open, rows are absolute indices."""
    if dataset.episodes is None:
        return None
    opened = sorted(set(dataset.episodes))
    lengths = dataset.meta.episodes["length"]
    return dict(zip(opened, accumulate((lengths[e] for e in opened), initial=0), strict=False))


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
