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
from collections import defaultdict
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
from lerobot_lam_diffusion.tokens.layout import HASH_BYTES

logger = logging.getLogger(__name__)

FORMAT = "episode hashes 2"  # to be changed where the same frames would get another hash
LOGGED_BYTES = 1 << 30  # reading that much takes seconds
_ROWS_AT_ONCE = 256


def episode_hashes(meta: Any, camera_key: str) -> Tensor:
    """A hash of each episode's frames of one camera.

    Args:
        meta: `LeRobotDatasetMetadata`.
        camera_key: The dataset's name of an RGB camera.

    Returns:
        uint8 `(E, 16)`; zeros where an episode's files are not on this machine, or cannot be read.
    """
    root = Path(meta.root)
    files = _files(root, camera_key)
    stamp = f"{FORMAT}: {stamp_of(files, root)}"
    place = place_of("episodes", root, camera_key)
    known = _table(recall(place, stamp), meta.total_episodes)
    if known is not None:
        return known
    size = sum(file.stat().st_size for file in files)
    if size > LOGGED_BYTES:
        logger.info("Reading %.1f GB of %s once, to recognise its frames later.", size / 1e9, root)
    passing: list[Any] = []
    table = _hash_all(meta, camera_key, passing)
    if not passing:
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


def _files(root: Path, camera_key: str) -> list[Path]:
    """All files that decide which frames there are."""
    folders = [root / "meta" / "episodes", root / "data", root / "videos" / camera_key]
    return sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())


def _table(noted: Any, num_episodes: int) -> Tensor | None:
    """Hashes as they were noted."""
    try:
        table = bytearray.fromhex(noted)
    except (TypeError, ValueError):  # there are none, or they are damaged
        return None
    if len(table) != num_episodes * HASH_BYTES:
        return None
    return torch.frombuffer(table, dtype=torch.uint8).view(num_episodes, HASH_BYTES)


def _hash_all(meta: Any, camera_key: str, passing: list[Any]) -> Tensor:
    """Hashes of all episodes.

    Args:
        passing: Receives what forbids to keep them: errors that may pass, as of a network file system, and
            images in files of their own, which no stamp covers.
    """
    table = torch.zeros(meta.total_episodes, HASH_BYTES, dtype=torch.uint8)
    if camera_key in meta.video_keys:
        hashes = _hash_videos(meta, camera_key, passing)
    else:
        hashes = _hash_images(meta, camera_key, passing)
    for episode, digest in hashes.items():
        table[episode] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    return table


def _hash_videos(meta: Any, camera_key: str, passing: list[Any]) -> dict[int, bytes]:
    rows = _rows(meta, ["timestamp"], passing)
    by_file: dict[Path, list[int]] = defaultdict(list)
    template, root = meta.video_path, Path(meta.root)
    chunks, numbers, starts = (
        list(meta.episodes[f"videos/{camera_key}/{name}"])
        for name in ("chunk_index", "file_index", "from_timestamp")
    )
    for episode in range(meta.total_episodes):
        where = {"chunk_index": int(chunks[episode]), "file_index": int(numbers[episode])}
        by_file[root / template.format(video_key=camera_key, **where)].append(episode)

    def hash_file(item: tuple[Path, list[int]]) -> dict[int, bytes]:
        path, episodes = item
        try:
            video = _Packets(path)
        except (OSError, ValueError, av.FFmpegError, IndexError) as error:  # nothing is known
            _note_error(error, passing)
            return {}
        return {
            episode: video.hash(
                [starts[episode] + float(t) for t in rows[episode]["timestamp"]], rows[episode]
            )
            for episode in episodes
            if episode in rows
        }

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return {
            episode: digest
            for part in pool.map(hash_file, by_file.items())
            for episode, digest in part.items()
        }


class _Packets:
    """The packets of a video file, in the order in which they are stored."""

    def __init__(self, path: Path) -> None:
        self.digests: list[bytes] = []
        self.seconds: list[float] = []
        self.keyframes: list[int] = []
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
            self.codec = repr(looks).encode() + bytes(codec.extradata or b"")
            for packet in container.demux(stream):
                if packet.size and packet.pts is not None:
                    if packet.is_keyframe:
                        self.keyframes.append(len(self.digests))
                    self.digests.append(hashlib.sha256(packet).digest())
                    self.seconds.append(float(packet.pts * packet.time_base))
        if not self.digests:
            raise ValueError("no frames")
        self._by_time = sorted(range(len(self.seconds)), key=self.seconds.__getitem__)
        self._times = np.array([self.seconds[packet] for packet in self._by_time])

    def hash(self, seconds: list[float], rows: dict[str, np.ndarray]) -> bytes:
        """Hash of the rows that show the frames nearest to `seconds`."""
        times = np.array(seconds)
        after = np.clip(np.searchsorted(self._times, times), 1, max(1, len(self._times) - 1))
        before = after - 1
        after = np.minimum(after, len(self._times) - 1)
        nearest = np.where(times - self._times[before] <= self._times[after] - times, before, after)
        shown = np.array(self._by_time)[nearest]
        first = (
            self.keyframes[max(0, bisect_right(self.keyframes, int(shown.min())) - 1)]
            if self.keyframes
            else 0
        )
        digest = hashlib.sha256(b"video" + self.codec)
        digest.update(b"".join(self.digests[first : int(shown.max()) + 1]))
        digest.update((shown - first).astype("<i8").tobytes())
        digest.update(rows["index"].astype("<i8").tobytes())
        return digest.digest()[:HASH_BYTES]


def _hash_images(meta: Any, camera_key: str, passing: list[Any]) -> dict[int, bytes]:
    rows = _rows(meta, [camera_key], passing, root=Path(meta.root))
    hashes = {}
    for episode, columns in rows.items():
        if not columns[camera_key].any(1).all():
            continue  # an image is not on this machine
        digest = hashlib.sha256(b"images")
        digest.update(columns[camera_key].tobytes())
        digest.update(columns["index"].astype("<i8").tobytes())
        hashes[episode] = digest.digest()[:HASH_BYTES]
    return hashes


def _note_error(error: Exception, passing: list[Any]) -> None:
    """An absent or damaged file stays so while it looks the same; other errors may pass."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        passing.append(error)


def _rows(
    meta: Any, names: list[str], passing: list[Any], root: Path | None = None
) -> dict[int, dict[str, np.ndarray]]:
    """Columns of each episode whose rows are all present, plus `index` relative to the episode's start.

    Args:
        root: The dataset's root if the columns are images; each is returned as its SHA-256, uint8 `(32,)`.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ["index", *names]}
    for file in sorted((Path(meta.root) / "data").glob("*/*.parquet")):
        try:
            read = pq.ParquetFile(file)
            for batch in read.iter_batches(_ROWS_AT_ONCE if root else 1 << 16, columns=[*columns]):
                for name in columns:
                    column = batch.column(name)
                    is_picture = root is not None and name != "index"
                    columns[name].append(
                        _picture_digests(column, root, passing)
                        if is_picture and root
                        else column.to_numpy(zero_copy_only=False)
                    )
        except (OSError, pa.ArrowException, KeyError) as error:  # what is unread stays unknown
            _note_error(error, passing)
            continue
    joined = {name: np.concatenate(parts) for name, parts in columns.items() if parts}
    if len(joined) < len(columns) or len({len(column) for column in joined.values()}) != 1:
        return {}
    found = {}
    first, end = (np.asarray(list(meta.episodes[f"dataset_{side}_index"])) for side in ("from", "to"))
    starts = np.searchsorted(joined["index"], first)
    for episode, (start, length) in enumerate(zip(starts.tolist(), (end - first).tolist(), strict=True)):
        if start + length <= len(joined["index"]) and joined["index"][start] == first[episode]:
            part = {name: column[start : start + length] for name, column in joined.items()}
            found[episode] = part | {"index": part["index"] - first[episode]}
    return found


def _picture_digests(column: pa.Array, root: Path, passing: list[Any]) -> np.ndarray:
    """SHA-256 of each picture, uint8 `(rows, 32)`; zeros for one that is not on this machine."""
    digests = []
    for picture in column.to_pylist():
        try:
            digests.append(hashlib.sha256(_picture(picture, root, passing)).digest())
        except FileNotFoundError:
            digests.append(bytes(32))
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), 32)


def _picture(picture: Any, root: Path, passing: list[Any]) -> bytes:
    """A picture's encoded bytes, or those of the file that it names."""
    if not isinstance(picture, dict):
        return repr(picture).encode()
    if picture.get("bytes") is not None:
        return picture["bytes"]
    passing.append(picture.get("path"))
    return (root / str(picture.get("path"))).read_bytes()
