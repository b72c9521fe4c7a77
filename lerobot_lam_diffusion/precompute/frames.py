"""Decode: the frames of an episode, the very ones that `LeRobotDataset` returns, each once and in order."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lerobot.datasets.video_utils import decode_video_frames
from torch import Tensor

from lerobot_lam_diffusion.lam.preprocess import as_uint8
from lerobot_lam_diffusion.problems import UserError

CHUNK_FRAMES = 64
"""Frames decoded at a time: bounds memory whatever the episode's length (64 × 480 × 640 × 3 = 59 MB)."""


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
        raise UserError(
            f"dataset {meta.repo_id!r} has no RGB camera for the LAM to look at; use another dataset"
        )
    if camera_key is None and len(cameras) == 1:
        return cameras[0]
    if camera_key is not None and camera_key in cameras:
        return camera_key
    found = "is a depth camera" if camera_key in meta.depth_keys else "is unknown"
    what = f"--camera_key={camera_key} {found}" if camera_key else "--camera_key is unset"
    raise UserError(
        f"{what}: dataset {meta.repo_id!r} has the RGB cameras {cameras}; pass one of them as --camera_key"
    )


class EpisodeFrames:
    """Frames of one camera of a LeRobot dataset.

    Args:
        dataset: `LeRobotDataset`, of all or some episodes.
        camera_key: An RGB camera of it, kept as video or as images.
        video_backend: "torchcodec" or "pyav"; the dataset's own if None.
    """

    def __init__(self, dataset: Any, camera_key: str, video_backend: str | None = None) -> None:
        self._dataset = dataset
        self._camera_key = camera_key
        self._video_backend = video_backend or dataset._video_backend
        self._is_video = camera_key in dataset.meta.video_keys
        columns = dataset.hf_dataset.data
        self._index = columns.column("index").to_numpy()  # ascending: the absolute frame of each row
        self._timestamps = columns.column("timestamp").to_numpy()

    def chunks(self, episode: int) -> Iterator[Tensor]:
        """Consecutive frames, uint8 `(T, 3, H, W)` with T at most `CHUNK_FRAMES`."""
        bounds = self._dataset.meta.episodes[episode]
        start, stop = bounds["dataset_from_index"], bounds["dataset_to_index"]
        first_row = int(np.searchsorted(self._index, start))
        for offset in range(0, stop - start, CHUNK_FRAMES):
            rows = range(first_row + offset, first_row + min(offset + CHUNK_FRAMES, stop - start))
            yield self._video(bounds, episode, rows) if self._is_video else self._images(rows)

    def _video(self, bounds: dict, episode: int, rows: range) -> Tensor:
        # Timestamps as `DatasetReader._query_videos` shifts them: a float32 column plus the episode's offset
        # in its video file.
        offset = bounds[f"videos/{self._camera_key}/from_timestamp"]
        return decode_video_frames(
            self._dataset.root / self._dataset.meta.get_video_file_path(episode, self._camera_key),
            [offset + float(t) for t in self._timestamps[rows.start : rows.stop]],
            self._dataset.tolerance_s,
            self._video_backend,
            return_uint8=True,
        )

    def _images(self, rows: range) -> Tensor:
        images = self._dataset.hf_dataset[list(rows)][self._camera_key]  # float32 in 0..1, from PNG
        return as_uint8(torch.stack(images))
