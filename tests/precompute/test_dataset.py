"""What is opened to be read from end to end: whole or refused by name, row for row as LeRobot reads it."""

import shutil
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.utils import MISSING_VERSION_TAG_MESSAGE

from lerobot_lam_diffusion.precompute import dataset as module
from lerobot_lam_diffusion.precompute.dataset import check_dataset, open_readable, open_whole
from lerobot_lam_diffusion.utils.errors import DatasetError, UserError
from tests.conftest import TOP, record_dataset, with_rows_beyond
from tests.hub_server import connect, serve
from tests.parquet import change_column, data_file

LENGTHS = (5, 6, 8, 3, 4, 6, 7, 7, 5, 9)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Ten episodes in several video files."""
    root = tmp_path_factory.mktemp("several") / "data"
    record_dataset(root, LENGTHS, file_size_mb=0.012)
    return root


@pytest.fixture
def root(recorded, tmp_path) -> Path:
    return shutil.copytree(recorded, tmp_path / "data")


def meta_of(root: Path) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata("local/x", root=root)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that can be reached and has nothing."""
    with serve() as server:
        connect(monkeypatch, server.url, tmp_path / "cache")
        yield server


def test_a_missing_video_is_named_without_asking_the_hub(root, hub):
    meta = meta_of(root)
    video = meta.get_video_file_path(4, TOP)
    (root / video).unlink()
    with pytest.raises(
        DatasetError, match=rf"'local/x' at {root} is not whole: {video} is not there"
    ) as error:
        open_whole(meta, root=root, video_backend="pyav")
    assert "Hub" not in str(error.value)
    dataset, unreadable = open_readable(meta, root=root, video_backend="pyav")
    in_file = [episode for episode in range(10) if meta.get_video_file_path(episode, TOP) == video]
    assert list(unreadable) == in_file
    assert dataset.episodes == [episode for episode in range(10) if episode not in in_file]
    others = open_whole(meta, root=root, episodes=dataset.episodes[:2], video_backend="pyav")
    assert others.num_episodes == 2
    with pytest.raises(UserError, match=f"all {len(in_file)} episodes .* were skipped"):
        open_readable(meta, root=root, episodes=in_file)
    assert hub.log == []


@pytest.mark.parametrize(
    ("failure", "is_answer"),
    [
        (httpx.ConnectError("no route to host"), False),
        (httpx.HTTPStatusError("503", request=None, response=None), False),
        (LocalEntryNotFoundError("not here"), False),
        (RuntimeError("Data processing error: the transport broke"), False),
        (RuntimeError(MISSING_VERSION_TAG_MESSAGE), True),
        (FileNotFoundError("no such file in the repository"), True),
        (ValueError("no name that the Hub knows"), True),
    ],
)
def test_a_hub_that_does_not_answer_makes_no_episode_missing(root, failure, is_answer, monkeypatch):
    """With --on_error=skip; else an outage would cost episodes for good."""
    meta = meta_of(root)
    video = meta.get_video_file_path(4, TOP)
    (root / video).unlink()
    opened = module.LeRobotDataset

    def fetch(*args, episodes=None, **options):
        if episodes is None:
            raise failure
        return opened(*args, episodes=episodes, **{**options, "root": root})

    monkeypatch.setattr(module, "LeRobotDataset", fetch)
    monkeypatch.setattr(module, "is_offline_mode", lambda: False)
    if is_answer:
        assert 4 in open_readable(meta, root=None, video_backend="pyav")[1]
    else:
        with pytest.raises(DatasetError, match="nor can it be fetched from the Hub"):
            open_readable(meta, root=None, video_backend="pyav")


def test_a_missing_data_file_is_named(root):
    meta = meta_of(root)
    data_file(root).unlink()
    with pytest.raises(DatasetError, match=r"is not whole: data/chunk-000/file-000.parquet is not there"):
        open_whole(meta, root=root)


@pytest.mark.parametrize("column", ["index", "episode_index"])
def test_rows_that_are_other_frames(root, column):
    change_column(data_file(root), column, lambda rows: rows[:5] + rows[18:4:-1] + rows[19:])
    with pytest.raises(DatasetError, match=r"row \d+ of the data files .* is called frame \d+ \(index\)"):
        open_whole(meta_of(root), root=root)


def test_rows_that_are_missing(root):
    path = data_file(root)
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 2), path)
    with pytest.raises(DatasetError, match=r"have 58 rows, the episodes in meta/episodes 60"):
        open_whole(meta_of(root), root=root)


def test_rows_beyond_the_last_episode_and_any_frame_index_are_lerobots_own_business(dataset, tmp_path):
    root = with_rows_beyond(dataset, tmp_path / "data")
    change_column(root / "data" / "chunk-000" / "file-000.parquet", "frame_index", range(60))
    check_dataset(open_whole(meta_of(root), root=root))
