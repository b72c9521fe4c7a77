"""Datasets that contradict themselves, lack files or have other cameras than RGB, told before any work."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

from lerobot_lam_diffusion.tokens.dataset_check import (
    absent_files,
    channels_of,
    check_metadata,
    files_of,
    not_rgb,
)
from lerobot_lam_diffusion.utils.errors import DatasetError
from tests.conftest import TOP
from tests.parquet import change_column, episodes_file


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return shutil.copytree(dataset.root, tmp_path / "copy")


def opened(root: Path) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata("local/copy", root=root)


def column(name: str, values: list):
    return lambda root: change_column(episodes_file(root), name, values, keep_type=False)


def info(**changes):
    def change(root: Path) -> None:
        path = root / "meta" / "info.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def rows(order: list[int]):
    return lambda root: pq.write_table(pq.read_table(episodes_file(root)).take(order), episodes_file(root))


FROM = [0, 14, 23, 40, 48]
CONTRADICTIONS = {
    "from and to begin anew": (column("dataset_from_index", [0] * 5), r"row 1 .* from 0 .* from 14"),
    "an overlap": (column("dataset_from_index", [0, 13, 23, 40, 48]), r"row 1 .* from 13 .* from 14"),
    "a gap": (column("dataset_to_index", [14, 22, 40, 48, 60]), r"row 1 .* to 22 .* from 14 to 23"),
    "not from the start": (column("dataset_from_index", [1, *FROM[1:]]), r"row 0 .* from 1 .* from 0 to 14"),
    "rows in another order": (rows([2, 0, 1, 3, 4]), r"row 0 of meta/episodes is episode 2"),
    "an episode twice": (rows([0, 1, 1, 3, 4]), r"row 2 of meta/episodes is episode 1"),
    "an episode is missing": (rows([0, 1, 3, 4]), r"row 2 .* is episode 3 .*expected episode 2"),
    "the first are missing": (rows([3, 4]), r"row 0 of meta/episodes is episode 3 .*expected episode 0"),
    "the last is missing": (rows([0, 1, 2, 3]), r"has 4 episodes and 48 frames, .*= 5 and total_frames = 60"),
    "total_frames": (info(total_frames=61), r"60 frames, meta/info.json says .* total_frames = 61"),
    "total_episodes": (info(total_episodes=4), r"has 5 episodes .*, meta/info.json says total_episodes = 4"),
    "lengths": (column("length", [14, 9, 16, 8, 12]), r"row 2 .* of 16 frames, from 23 .* to 40 .* to 39"),
    "no length": (column("length", [14, 9, None, 8, 12]), r"lacks a number in length"),
    "no number": (column("dataset_to_index", [14, 23, None, 48, 60]), r"lacks a number in dataset_to_index"),
    "no offset": (column(f"videos/{TOP}/from_timestamp", ["a"] * 5), rf"lacks a number in videos/{TOP}/from"),
}  # fmt: skip


def test_metadata_as_recorded_are_accepted(dataset):
    check_metadata(dataset.meta)


def test_episodes_of_a_file_that_two_numbers_name(copy):
    info(video_path="videos/{video_key}.mp4")(copy)
    column(f"videos/{TOP}/file_index", [0, 0, 1, 1, 2])(copy)
    assert files_of(opened(copy), TOP) == {Path(f"videos/{TOP}.mp4"): [0, 1, 2, 3, 4]}


@pytest.mark.parametrize(("change", "expected"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_metadata_that_contradict_themselves(copy, change, expected):
    change(copy)
    with pytest.raises(DatasetError, match=r"contradicts itself.*Restore its meta/episodes") as error:
        check_metadata(opened(copy))
    assert re.search(expected, str(error.value), re.S)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "is not there"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs"),
    ],
)
def test_files_that_are_not_here_are_named_with_their_episodes(copy, content, why):
    meta = opened(copy)
    assert absent_files(meta) == {}
    video = copy / meta.get_video_file_path(0, TOP)
    video.unlink() if content is None else video.write_bytes(content)
    ((what, episodes),) = absent_files(meta).items()
    assert what.startswith(f"{video.relative_to(copy)} {why}")
    assert episodes == [0, 1, 2, 3, 4]
    assert list(absent_files(meta, [3]).values()) == [[3]]


def test_data_files_count_by_their_rows(copy):
    """`data/file_index` that names no file is no harm: LeRobot reads all that there is."""
    change_column(episodes_file(copy), "data/file_index", [0, 1, 1, 2, 2])
    assert absent_files(opened(copy)) == {}
    (data,) = (copy / "data").rglob("*.parquet")
    pq.write_table(pq.read_table(data).slice(0, 14), data)
    assert absent_files(opened(copy), [0, 2]) == {"data/chunk-000/file-001.parquet is not there": [2]}
    data.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DatasetError, match=r"file-000.parquet is a git-lfs pointer.*Fetch or repair"):
        absent_files(opened(copy))


@pytest.mark.parametrize(
    ("shape", "names", "channels"),
    [
        ((480, 640, 3), ["height", "width", "channels"], 3),
        ((480, 640, 1), ["height", "width", "channel"], 1),
        ((480, 640, 4), None, 4),
        ((480, 640), ["height", "width"], 1),
        ((3, 480, 640), ["channels", "height", "width"], 3),
        ((3, 480, 640), None, 3),
        ((1, 480, 640), ["channels", "height", "width"], 1),
        ((480, 640, 3), ["channels", "height", "width"], 3),
    ],
)
def test_channels_of_a_camera(shape, names, channels):
    assert channels_of({"shape": shape, "names": names}) == channels


def test_cameras_that_are_not_rgb(copy):
    document = json.loads((copy / "meta" / "info.json").read_text())
    document["features"][TOP]["shape"] = [48, 48, 1]
    info(features=document["features"])(copy)
    assert not_rgb(opened(copy)) == {TOP: "has 1 channel (shape (48, 48, 1)), not RGB's 3"}
