"""Identify the frames of one camera by a digest of their files rather than of their statistics.

It covers the episode boundaries, the rows and timestamps in the data files, and either the encoded images in
them or, for videos, which file each episode is in, its start time there, and the content of those files.
Video files are identified by their content and by the order in which episodes refer to them, so a copy, a
download or a different file numbering counts as the same dataset. All images are read; of a video file larger
than `WHOLE_BYTES`, only its size, its start and end (which hold its frame table), and blocks in between.

The contents are read once per machine: the result is cached under LeRobot's home, and trusted as long as the
files keep their size and times.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lerobot_lam_diffusion.tokens.checked import note, place_of, recall, stamp_of
from lerobot_lam_diffusion.tokens.dataset_check import episode_column, files_of, image_bytes, parquet_files

logger = logging.getLogger(__name__)

SCHEME = "frames-1"
WHOLE_BYTES = 4 << 20
EDGE_BYTES = 1 << 20
BLOCK_BYTES = 64 << 10
BLOCKS = 32
ROWS = ("index", "episode_index", "timestamp")
_AS_READ = {"timestamp": "<f4"}  # LeRobot casts it; the others are int64
_BOUNDARIES = ("episode_index", "length", "dataset_from_index", "dataset_to_index")


def frames_digest(meta: Any, camera_key: str) -> str | None:
    """SHA-256 of a camera's frames and their positions; None if any of its files is not on this machine.

    Args:
        meta: `LeRobotDatasetMetadata`.
        camera_key: One of the dataset's cameras, stored as video or as images.

    A file that cannot be read counts as missing; reading its frames later reports what is wrong with it.
    """
    try:
        return _digest(meta, camera_key)
    except (OSError, KeyError, pa.ArrowException) as error:
        logger.debug("the frames of %s cannot be identified: %s", meta.root, error)
        return None


def _digest(meta: Any, camera_key: str) -> str | None:
    if meta.episodes is None:
        return None
    root = Path(meta.root)
    is_video = camera_key in meta.video_keys
    names = [name for name in _BOUNDARIES if name in meta.episodes.column_names]
    columns = {name: episode_column(meta, name).astype("<i8") for name in names}
    videos: list[Path] = []
    if is_video:
        files = files_of(meta, camera_key)
        columns["file"] = np.empty(len(meta.episodes), "<i8")
        for number, episodes in enumerate(files.values()):
            columns["file"][episodes] = number
        columns["from"] = episode_column(meta, f"videos/{camera_key}/from_timestamp").astype("<f8")
        videos = [root / file for file in files]
    content = _content(root, camera_key, videos, is_video, int(meta.total_frames))
    if content is None:
        return None
    digest = hashlib.sha256(f"{SCHEME}:{'video' if is_video else 'images'}:{content}".encode())
    for name, values in columns.items():
        digest.update(f"{name}:{len(values)}:".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _content(root: Path, camera_key: str, videos: list[Path], is_video: bool, rows: int) -> str | None:
    """Digest of what the data and video files hold, as noted or found; None: rows are missing."""
    data = parquet_files(root)
    stamp = f"{SCHEME}:{is_video}:{rows}:{stamp_of((*data, *videos), root)}"
    place = place_of("frames", root, camera_key)
    known = recall(place, stamp)
    if known is not None:
        return str(known)
    columns = [hashlib.sha256() for _ in ROWS]
    images = hashlib.sha256()
    beside: list[Path] = []  # image files that data files name: no stamp covers them, so no note is kept
    found = 0
    for file in data:
        parquet = pq.ParquetFile(file)
        found += parquet.metadata.num_rows
        table = parquet.read(columns=list(ROWS))
        for name, column in zip(ROWS, columns, strict=True):
            column.update(table[name].to_numpy().astype(_AS_READ.get(name, "<i8")).tobytes())
        if not is_video:
            for batch in parquet.iter_batches(batch_size=64, columns=[camera_key]):
                for image in batch.column(0).to_pylist():
                    content = image_bytes(image, root, beside)
                    images.update(len(content).to_bytes(8, "little") + content)
    if found != rows:
        return None
    total = hashlib.sha256(b"".join(part.digest() for part in (*columns, images)))
    for file in videos:
        total.update(_file_digest(file))
    if not beside:
        note(place, stamp, total.hexdigest())
    return total.hexdigest()


def _file_digest(path: Path) -> bytes:
    """Digest of a file's size and content; for a large file, of parts at fixed places."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return digest.digest()
        for block in range(BLOCKS):
            file.seek(size * block // BLOCKS)
            digest.update(file.read(BLOCK_BYTES))
        for edge in (0, size - EDGE_BYTES):
            file.seek(edge)
            digest.update(file.read(EDGE_BYTES))
    return digest.digest()
