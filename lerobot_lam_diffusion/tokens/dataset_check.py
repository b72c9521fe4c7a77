"""What is wrong with a dataset, found in its metadata and the names of its files before any work begins."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lerobot_lam_diffusion.utils.errors import DatasetError, first_line

RGB_CHANNELS = 3
LFS_POINTER = b"version https://git-lfs"
BOUNDARIES = ("episode_index", "dataset_from_index", "dataset_to_index")

type Absent = dict[str, list[int]]
"""What a dataset lacks, for messages (`videos/…/file-001.mp4 is not there`) → the episodes that need it."""


def check_metadata(meta: Any) -> None:
    """Refuse a dataset whose episodes contradict one another or `meta/info.json`.

    LeRobot assumes that row e of `meta/episodes` is episode e and that frame i of the dataset is row i of the
    data files, so episodes must follow one another without gaps or overlaps.

    Args:
        meta: `LeRobotDatasetMetadata`.

    Raises:
        DatasetError: names the first contradiction.
    """
    problem = _contradiction(meta)
    if problem:
        raise DatasetError(
            f"dataset {meta.repo_id!r} at {meta.root} contradicts itself, so it is not known which frames an "
            f"episode has: {problem}. Restore its meta/episodes and meta/info.json, or convert or record it "
            "again"
        )


def _contradiction(meta: Any) -> str | None:
    if meta.episodes is None or not len(meta.episodes):
        return f"it has no episodes (meta/info.json says total_episodes = {meta.total_episodes})"
    wanted = [*BOUNDARIES, "data/chunk_index", "data/file_index"]
    wanted += [
        f"videos/{key}/{name}"
        for key in meta.video_keys
        for name in ("chunk_index", "file_index", "from_timestamp")
    ]
    wanted += ["length"] if "length" in meta.episodes.column_names else []
    try:
        columns = {name: episode_column(meta, name) for name in wanted}
    except KeyError as error:
        return f"meta/episodes lacks a number in {error.args[0]}"
    number, start, stop = (columns[name] for name in BOUNDARIES)
    length = columns.get("length", stop - start)
    begin = np.concatenate([[0], stop[:-1]])  # where the episode before it ends
    wrong = (number != np.arange(len(number))) | (start != begin) | (stop != begin + length) | (length <= 0)
    if wrong.any():
        row = int(wrong.argmax())
        return (
            f"row {row} of meta/episodes is episode {number[row]} of {length[row]} frames, from "
            f"{start[row]} (dataset_from_index) to {stop[row]} (dataset_to_index); expected episode {row} of "
            f"one frame or more, from {begin[row]} to {begin[row] + length[row]}"
        )
    if (len(number), stop[-1]) != (meta.total_episodes, meta.total_frames):
        return (
            f"meta/episodes has {len(number)} episodes and {stop[-1]} frames, meta/info.json says "
            f"total_episodes = {meta.total_episodes} and total_frames = {meta.total_frames}"
        )
    return None


def episode_bounds(meta: Any) -> tuple[Tensor, Tensor]:
    """First frame and end of every episode of a dataset, int64 `(E,)` each."""
    start = torch.tensor(meta.episodes["dataset_from_index"], dtype=torch.int64)
    stop = torch.tensor(meta.episodes["dataset_to_index"], dtype=torch.int64)
    return start, stop


def episode_column(meta: Any, name: str) -> np.ndarray:
    """A column of numbers of `meta/episodes`, `(E,)`.

    Raises:
        KeyError: it is absent, or does not hold a number for each episode.
    """
    try:
        values = meta.episodes.data.column(name).to_numpy()  # 100 x as fast as by item
    except (KeyError, TypeError, ValueError) as error:
        raise KeyError(name) from error
    if values.ndim != 1 or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise KeyError(name)
    return values


def not_rgb(meta: Any) -> dict[str, str]:
    """The dataset's cameras that a LAM cannot look at, and why: `is a depth camera`, `has 1 channel …`."""
    reasons = {}
    for key in meta.camera_keys:
        feature = meta.features[key]
        channels = channels_of(feature)
        if key in meta.depth_keys:
            reasons[key] = "is a depth camera"
        elif channels != RGB_CHANNELS:
            plural = "" if channels == 1 else "s"
            reasons[key] = f"has {channels} channel{plural} (shape {tuple(feature['shape'])}), not RGB's 3"
    return reasons


def channels_of(feature: dict) -> int:
    """Channels of a camera by its declared shape, channels-last unless its names say otherwise."""
    shape, names = list(feature["shape"]), feature.get("names")
    if len(shape) < 3:
        return 1
    if isinstance(names, list | tuple) and len(names) == len(shape):
        named = [n for n, name in enumerate(names) if str(name).lower() in ("channel", "channels", "c")]
        if len(named) == 1 and shape[named[0]] <= 4:
            return shape[named[0]]
    first, last = shape[0], shape[-1]
    return first if first == RGB_CHANNELS and last > 4 else last


def absent_files(meta: Any, episodes: Collection[int] | None = None) -> Absent:
    """Which of a dataset's files are not on this machine.

    Data files are judged by the rows they contain: LeRobot reads every file in `data/`, whatever name
    `meta/episodes` gives it.

    Args:
        meta: `LeRobotDatasetMetadata`, checked by `check_metadata`.
        episodes: Episodes that are needed; None: all.

    Raises:
        DatasetError: a data file cannot be read.
    """
    wanted = set(range(len(meta.episodes)) if episodes is None else episodes)
    absent: Absent = {}
    recorded = _recorded_episodes(Path(meta.root))
    for path, needed_by in _files(meta, "data", meta.data_path).items():
        lacking = [episode for episode in needed_by if episode in wanted and episode not in recorded]
        if lacking:
            why = why_absent(Path(meta.root) / path) or "has none of their rows"
            absent[f"{path} {why}"] = lacking
    for path, needed_by in video_files(meta).items():
        lacking = [episode for episode in needed_by if episode in wanted]
        reason = why_absent(Path(meta.root) / path) if lacking else None
        if reason:
            absent[f"{path} {reason}"] = lacking
    return absent


def refuse_absent(meta: Any, absent: Absent, why_not_fetched: str = "") -> None:
    """Refuse a dataset with missing files.

    Raises:
        DatasetError: names what is missing, if anything.
    """
    if not absent:
        return
    what, episodes = next(iter(absent.items()))
    needed = f"episode {episodes[0]}" + (f" and {len(episodes) - 1} more" if len(episodes) > 1 else "")
    others = f"; {len(absent) - 1} more files as well" if len(absent) > 1 else ""
    raise DatasetError(
        f"dataset {meta.repo_id!r} at {meta.root} is not whole: {what}, which {needed} needs{others}"
        f"{why_not_fetched}. Restore what is missing"
    )


def video_files(meta: Any) -> dict[Path, list[int]]:
    """Video files of all cameras, relative to the dataset's root → the episodes in them."""
    return {path: episodes for key in meta.video_keys for path, episodes in files_of(meta, key).items()}


def files_of(meta: Any, video_key: str) -> dict[Path, list[int]]:
    """Video files of a camera → the episodes in them, in the order in which episodes come to them."""
    return _files(meta, f"videos/{video_key}", meta.video_path, video_key=video_key)


def _files(meta: Any, prefix: str, template: str, **names: str) -> dict[Path, list[int]]:
    chunks, files = (episode_column(meta, f"{prefix}/{part}_index").tolist() for part in ("chunk", "file"))
    found: dict[tuple[float, float], list[int]] = defaultdict(list)
    for episode, numbers in enumerate(zip(chunks, files, strict=True)):
        found[numbers].append(episode)
    paths: dict[Path, list[int]] = defaultdict(list)
    for (chunk, file), episodes in found.items():  # a template may leave one of the two out
        paths[Path(template.format(chunk_index=int(chunk), file_index=int(file), **names))] += episodes
    return paths


def image_bytes(image: Any, root: Path, beside: list[Path]) -> bytes:
    """An image of a data file as it is encoded, or the file that it names, which is added to `beside`.

    Raises:
        OSError: there is no image, or its file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if not isinstance(image, dict):
        raise FileNotFoundError("a row has no image")
    if image.get("bytes") is not None:
        return image["bytes"]
    beside.append(root / str(image.get("path")))
    return beside[-1].read_bytes()


def parquet_files(root: Path) -> list[Path]:
    """The data files that LeRobot reads, in its order."""
    return sorted((root / "data").glob("*/*.parquet"))


def read_frames(meta: Any, columns: Collection[str] | None = None) -> Iterator[tuple[Path, pa.Table, range]]:
    """Read the data files as LeRobot does: one after another, taking the row number as the frame index.

    Rows past the dataset's last frame, left by an interrupted recording, do not count as frames.

    Args:
        columns: Columns to read besides `index` and `episode_index`; None: all.

    Yields:
        A file, its table, and the range of frames that its first rows hold.

    Raises:
        DatasetError: a row is labelled as another frame, or frames are missing.
    """
    first, ends = 0, episode_column(meta, "dataset_to_index")
    wanted = None if columns is None else ["index", "episode_index", *columns]
    for path in parquet_files(Path(meta.root)):
        table = pq.ParquetFile(path).read(columns=wanted)
        frames = np.arange(first, min(first + len(table), meta.total_frames))
        expected = np.searchsorted(ends, frames, side="right")
        refuse_other_frames(str(path), table.slice(0, len(frames)), frames, expected)
        yield path, table, range(first, first + len(frames))
        first += len(table)
    if first < meta.total_frames:
        raise DatasetError(
            f"the data files of {meta.root} lack frame {first} of the dataset's {meta.total_frames}; "
            "download or restore the dataset"
        )


def refuse_other_frames(
    where: str, table: pa.Table, frames: np.ndarray, episodes: np.ndarray, first: int = 0
) -> None:
    """Refuse rows whose frame and episode labels contradict `meta/episodes`.

    Args:
        where: Where the rows come from, for the message.
        table: Has the columns `index` and `episode_index`.
        frames, episodes: Frame and episode of each row according to `meta/episodes`.
        first: Number of the table's first row.

    Raises:
        DatasetError: names the first row that is labelled as another frame.
    """
    index, episode = (table[name].to_numpy() for name in ("index", "episode_index"))
    wrong = (index != frames) | (episode != episodes)
    if wrong.any():
        at = int(wrong.argmax())
        raise DatasetError(
            f"row {first + at} of {where} is called frame {index[at]} (index) of episode {episode[at]} "
            f"(episode_index), by meta/episodes it is frame {frames[at]} of episode {episodes[at]}. "
            "Restore the dataset, or convert or record it again"
        )


def _recorded_episodes(root: Path) -> set[int]:
    """Episodes that have rows in the data files."""
    recorded: set[int] = set()
    for path in parquet_files(root):
        try:
            column = pq.ParquetFile(path).read(columns=["episode_index"])["episode_index"]
        except (OSError, pa.ArrowException, KeyError) as error:
            reason = why_absent(path) or f"cannot be read ({first_line(error)})"
            raise DatasetError(f"{path} {reason}. Fetch or repair the file") from error
        recorded.update(int(episode) for episode in column.unique().to_pylist())
    return recorded


def why_absent(path: Path) -> str | None:
    """Why a file counts as absent, judged without reading all of it; None if it is present."""
    try:
        size = path.stat().st_size
        if size == 0:
            return "is empty"
        if size < 1024:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    return "is a git-lfs pointer, not the file itself (git lfs pull)"
    except OSError as error:
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        return "is not there" if absent else f"cannot be read ({error.strerror})"
    return None
