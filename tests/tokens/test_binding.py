"""A store is used with the dataset that it was made of, and with no other."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.dataset_tools import add_features, delete_episodes, reencode_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.binding import dataset_digest
from tests.conftest import EPISODE_LENGTHS, TOP, record_dataset


def refusal(store, meta) -> str:
    with pytest.raises(TokenStoreError) as error:
        TokenStore.open(store.path, meta)
    told = str(error.value)
    assert str(store.path) in told
    assert repr(meta.repo_id) in told
    assert "does not belong to dataset" in told
    assert "lerobot-lam-precompute" in told
    return told


@pytest.fixture
def copied_root(dataset, tmp_path):
    return shutil.copytree(dataset.root, tmp_path / "data")


def test_store_fits_its_dataset_wherever_that_lies(store, dataset, copied_root):
    TokenStore.open(store.path, dataset.meta)
    TokenStore.open(store.path, LeRobotDatasetMetadata("local/renamed", root=copied_root))


def test_store_fits_an_episode_subset_of_its_dataset(store, partial_store, dataset):
    subset = LeRobotDataset(dataset.repo_id, root=dataset.root, episodes=[1, 3], video_backend="pyav")
    TokenStore.open(store.path, subset.meta)
    TokenStore.open(partial_store.path, subset.meta)


def test_another_column_does_not_make_it_another_dataset(store, dataset, tmp_path):
    column = (np.zeros((60, 3), np.float32), {"dtype": "float32", "shape": (3,), "names": None})
    edited = add_features(
        dataset, {"observation.extra": column}, output_dir=tmp_path / "edited", repo_id="local/e"
    )
    TokenStore.open(store.path, edited.meta)


def test_dataset_with_a_deleted_episode(store, dataset, tmp_path):
    edited = delete_episodes(dataset, [0], output_dir=tmp_path / "edited", repo_id="local/edited")
    told = refusal(store, edited.meta)
    assert "it has 60 frames, the dataset 46" in told
    assert "it has 5 episodes, the dataset 4" in told


def test_dataset_of_as_many_frames_with_other_content(store, tmp_path):
    other = record_dataset(tmp_path / "other", seed=1)
    assert other.meta.total_frames == store.num_frames
    assert "episodes differ from those that the tokens were made of" in refusal(store, other.meta)


def test_dataset_whose_video_was_encoded_again_in_place(store, copied_root):
    """Its frames are other pixels now, although no number about them has changed."""
    reencode_dataset(
        LeRobotDataset("local/squares", root=copied_root), rgb_encoder=RGBEncoderConfig(vcodec="h264", crf=30)
    )
    told = refusal(store, LeRobotDatasetMetadata("local/squares", root=copied_root))
    assert "video encoded again" in told


def test_a_store_from_before_the_videos_encoding_counted(store, dataset, copied_root, tmp_path):
    """Its digest has no part for it: it is still known, and as blind to that as it was."""
    old = shutil.copytree(store.path, tmp_path / "old")
    document = json.loads((old / "lam_tokens.json").read_text())
    info = copied_root / "meta" / "info.json"
    features = json.loads(info.read_text())
    del features["features"][TOP]["info"]
    info.write_text(json.dumps(features))
    bare = LeRobotDatasetMetadata("local/squares", root=copied_root)
    assert dataset_digest(bare, TOP) != document["dataset"]["digest"]
    document["dataset"]["digest"] = dataset_digest(bare, TOP)
    del document["dataset"]["frames"]
    document["format_version"] = 2
    (old / "lam_tokens.json").write_text(json.dumps(document))
    TokenStore.open(old, dataset.meta)


def test_episodes_of_other_lengths_with_the_same_sum(store, tmp_path):
    other = record_dataset(tmp_path / "other", lengths=EPISODE_LENGTHS[::-1])
    assert "episodes differ" in refusal(store, other.meta)


def test_other_fps(store, dataset, copied_root):
    info = copied_root / "meta" / "info.json"
    info.write_text(info.read_text().replace('"fps": 10', '"fps": 20'))
    assert "it has 10 fps, the dataset 20" in refusal(
        store, LeRobotDatasetMetadata("local/squares", root=copied_root)
    )


def test_dataset_without_the_stores_camera(store, tmp_path):
    other = record_dataset(tmp_path / "other", cameras=("observation.images.wrist",))
    told = refusal(store, other.meta)
    assert f"its camera {TOP!r} is not among the dataset's cameras ['observation.images.wrist']" in told


def test_all_differences_are_told_at_once(store, tmp_path):
    other = record_dataset(tmp_path / "other", lengths=(4,), cameras=("observation.images.wrist",))
    told = refusal(store, other.meta)
    assert "3 problems" in told
    assert "it has 60 frames, the dataset 4" in told
    assert "it has 5 episodes, the dataset 1" in told
    assert "its camera" in told


@pytest.mark.parametrize("feature", ["action", "observation.state", TOP])
def test_digest_sees_each_features_statistics(dataset, copied_root, feature):
    """What other recordings of as many frames differ in."""
    meta = LeRobotDatasetMetadata("local/squares", root=copied_root)
    before = dataset_digest(meta, TOP)
    assert before == dataset_digest(dataset.meta, TOP)
    (file,) = (copied_root / "meta" / "episodes").rglob("*.parquet")
    table = pq.read_table(file)
    name = f"stats/{feature}/mean"
    place = table.column_names.index(name)
    values = table[name].to_pylist()
    changed = [values[1], values[0], *values[2:]]
    pq.write_table(table.set_column(place, name, pa.array(changed, table[name].type)), file)
    assert dataset_digest(meta, TOP) != before


def test_digest_differs_between_cameras(tmp_path):
    meta = record_dataset(tmp_path / "two", lengths=(4,), cameras=(TOP, "observation.images.wrist")).meta
    assert dataset_digest(meta, TOP) != dataset_digest(meta, "observation.images.wrist")


def test_digest_does_not_depend_on_how_episodes_are_filed(dataset, copied_root):
    """LeRobot may spread `meta/episodes` over several files."""
    (file,) = (copied_root / "meta" / "episodes").rglob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(table[3:], file)
    pq.write_table(table[:3], file.with_name("file-001.parquet"))
    meta = LeRobotDatasetMetadata("local/squares", root=copied_root)
    assert dataset_digest(meta, TOP) == dataset_digest(dataset.meta, TOP)


def test_dataset_of_an_old_layout_is_told_how_to_convert(dataset, copied_root):
    meta = LeRobotDatasetMetadata("local/squares", root=copied_root)
    shutil.rmtree(copied_root / "meta" / "episodes")
    with pytest.raises(UserError, match=r"has no meta/episodes/\*\.parquet.*convert_dataset_v21_to_v30"):
        dataset_digest(meta, TOP)
