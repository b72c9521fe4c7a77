"""Identify equal episodes in two datasets by a hash of each episode's encoded images.

    video    the packets from the keyframe before its first frame to its last frame, and which of them each
             row shows (LeRobot shows the frame nearest to `from_timestamp + timestamp`)
    images   the encoded bytes of each row's image

File names, file offsets and statistics are not hashed, so an episode keeps its hash in a copy, after a
download and in a dataset that has grown (LeRobot appends to a video by copying packets). A changed image,
order or frame offset changes the hash. Nothing is decoded. All of the camera's bytes are read once; the
hashes are then cached under LeRobot's home for as long as the files keep their sizes and times.
"""

import hashlib
import logging
import os
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.checked import note, place_of, recall, stamp_of
from lerobot_lam_diffusion.tokens.dataset_check import episode_column, files_of, image_bytes, parquet_files
from lerobot_lam_diffusion.tokens.layout import HASH_BYTES, unknown_hashes

logger = logging.getLogger(__name__)

FORMAT = "episode hashes 2"  # to be changed where the same frames would get another hash
LOGGED_BYTES = 1 << 30  # reading that much takes seconds
ROWS_AT_ONCE = 256


def episode_hashes(meta: Any, camera_key: str) -> Tensor:
    """A hash of each episode's frames of one camera.

    Args:
        meta: `LeRobotDatasetMetadata`.
        camera_key: The dataset's name of an RGB camera.

    Returns:
        uint8 `(E, 16)`; zeros where an episode's files are not on this machine, or cannot be read.
    """
    root = Path(meta.root)
    folders = [root / "meta" / "episodes", root / "data", root / "videos" / camera_key]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    stamp = f"{FORMAT}: {stamp_of(files, root)}"
    place = place_of("episodes", root, camera_key)
    known = _table(recall(place, stamp), meta.total_episodes)
    if known is not None:
        return known
    size = sum(file.stat().st_size for file in files)
    if size > LOGGED_BYTES:
        logger.info("Reading %.1f GB of %s once, to recognise its frames later.", size / 1e9, root)
    hasher = _Hasher(meta, camera_key)
    table = unknown_hashes(meta.total_episodes)
    for episode, digest in hasher.hashes().items():
        table[episode] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    if not hasher.passing:
        note(place, stamp, table.numpy().tobytes().hex())
    return table


def differing_episodes(one: Tensor, other: Tensor) -> list[int]:
    """Episodes known to differ: their hashes, uint8 `(E, 16)`, are both known and unequal."""
    return (are_known(one) & are_known(other) & (one != other).any(1)).nonzero().flatten().tolist()


def are_known(hashes: Tensor) -> Tensor:
    """Which of the hashes are not the zeros of an episode that could not be read, bool `(E,)`."""
    return (hashes != 0).any(1)  # `any` of uint8 is uint8, whose `~` is never 0


def codec_name(decoder: av.Codec) -> str:
    """The name of a decoder's codec, which is the file's; `decoder.name` depends on the FFmpeg build.

    For AV1 it is the name of the decoder in PyAV's wheels: hashes in existing stores were made with that.
    """
    name = decoder.canonical_name
    return "libdav1d" if name == "av1" else name


def _table(noted: Any, num_episodes: int) -> Tensor | None:
    """Hashes as they were noted."""
    try:
        table = bytearray.fromhex(noted)
    except (TypeError, ValueError):  # there are none, or they are damaged
        return None
    if len(table) != num_episodes * HASH_BYTES:
        return None
    return torch.frombuffer(table, dtype=torch.uint8).view(num_episodes, HASH_BYTES)


class _Hasher:
    """Reads a camera's files.

    Attributes:
        passing: What forbids to note the hashes: errors that may pass, as of a network file system, and
            images in files of their own, which no stamp covers.
    """

    def __init__(self, meta: Any, camera_key: str) -> None:
        self._meta = meta
        self._camera_key = camera_key
        self._root = Path(meta.root)
        self.passing: list[Any] = []

    def hashes(self) -> dict[int, bytes]:
        """Hashes of the episodes that can be read."""
        if self._camera_key in self._meta.video_keys:
            return self._of_videos()
        hashes = {}
        for episode, images in self._rows(self._camera_key).items():
            if images.any(1).all():  # else an image is not on this machine
                content = b"images" + images.tobytes() + _numbers(np.arange(len(images)))
                hashes[episode] = hashlib.sha256(content).digest()[:HASH_BYTES]
        return hashes

    def _of_videos(self) -> dict[int, bytes]:
        rows = self._rows("timestamp")
        starts = episode_column(self._meta, f"videos/{self._camera_key}/from_timestamp")

        def hash_file(item: tuple[Path, list[int]]) -> dict[int, bytes]:
            path, episodes = item
            try:
                video = _Packets(self._root / path)
            except (OSError, ValueError, av.FFmpegError, IndexError) as error:  # nothing is known
                self._note_error(error)
                return {}
            return {
                episode: video.hash(starts[episode] + rows[episode].astype(np.float64))
                for episode in episodes
                if episode in rows
            }

        hashes: dict[int, bytes] = {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for part in pool.map(hash_file, files_of(self._meta, self._camera_key).items()):
                hashes |= part
        return hashes

    def _rows(self, name: str) -> dict[int, np.ndarray]:
        """A column of each episode whose rows are all present; images as their SHA-256, uint8 `(T, 32)`."""
        parts = []
        for file in parquet_files(self._root):
            try:
                for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, columns=["index", name]):
                    column = batch.column(name)
                    values = column.to_numpy() if name == "timestamp" else self._image_digests(column)
                    parts.append((batch.column("index").to_numpy(), values))
            except (OSError, pa.ArrowException, KeyError) as error:  # what is unread stays unknown
                self._note_error(error)
        if not parts:
            return {}
        index, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        first, end = (episode_column(self._meta, f"dataset_{side}_index") for side in ("from", "to"))
        rows = {}
        for episode, at in enumerate(np.searchsorted(index, first).tolist()):
            here = slice(at, at + int(end[episode] - first[episode]))
            if np.array_equal(index[here], np.arange(first[episode], end[episode])):
                rows[episode] = values[here]
        return rows

    def _image_digests(self, column: pa.Array) -> np.ndarray:
        """SHA-256 of each image, uint8 `(rows, 32)`; zeros for one that is not on this machine."""
        digests = []
        for image in column.to_pylist():
            try:
                digests.append(hashlib.sha256(image_bytes(image, self._root, self.passing)).digest())
            except FileNotFoundError:
                digests.append(bytes(32))
        return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), 32)

    def _note_error(self, error: Exception) -> None:
        """An absent or damaged file stays so while it looks the same; other errors may pass."""
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            self.passing.append(error)


class _Packets:
    """The packets of a video file, in the order in which they are stored."""

    def __init__(self, path: Path) -> None:
        self._digests: list[bytes] = []
        self._keyframes: list[int] = []
        seconds: list[float] = []
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            codec = stream.codec_context
            looks = (
                codec_name(codec.codec),
                codec.width,
                codec.height,
                codec.pix_fmt,
                codec.color_range,
                codec.colorspace,
            )
            self._codec = repr(looks).encode() + bytes(codec.extradata or b"")
            for packet in container.demux(stream):
                if packet.size and packet.pts is not None:
                    if packet.is_keyframe:
                        self._keyframes.append(len(self._digests))
                    self._digests.append(hashlib.sha256(packet).digest())
                    seconds.append(float(packet.pts * packet.time_base))
        if not self._digests:
            raise ValueError("no frames")
        self._by_time = np.argsort(seconds, kind="stable")
        self._times = np.array(seconds)[self._by_time]

    def hash(self, seconds: np.ndarray) -> bytes:
        """Hash of the rows that show the frames nearest to `seconds`."""
        after = np.searchsorted(self._times, seconds).clip(max=len(self._times) - 1)
        before = (after - 1).clip(min=0)
        nearest = np.where(seconds - self._times[before] <= self._times[after] - seconds, before, after)
        shown = self._by_time[nearest]
        keyframe = max(0, bisect_right(self._keyframes, int(shown.min())) - 1)
        first = self._keyframes[keyframe] if self._keyframes else 0
        digest = hashlib.sha256(b"video" + self._codec)
        digest.update(b"".join(self._digests[first : int(shown.max()) + 1]))
        digest.update(_numbers(shown - first) + _numbers(np.arange(len(shown))))
        return digest.digest()[:HASH_BYTES]


def _numbers(values: np.ndarray) -> bytes:
    return values.astype("<i8").tobytes()
