"""A dataset with a column of tokens: what is in it, what LeRobot's tools make of it, what is refused."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.configs import RGBEncoderConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.dataset_tools import (
    delete_episodes,
    merge_datasets,
    recompute_stats,
    reencode_dataset,
    remove_feature,
    split_dataset,
)
from lerobot.datasets.io_utils import load_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.scripts.lerobot_edit_dataset import DeleteEpisodesConfig, EditDatasetConfig, edit_dataset
from torch.utils.data import DataLoader

from lerobot_lam_diffusion import OBS_LAM_TOKENS
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.add_column import add_column
from lerobot_lam_diffusion.tokens.check_column import check_values, open_column
from lerobot_lam_diffusion.tokens.column import read_column
from lerobot_lam_diffusion.utils.errors import DatasetError, UserError
from tests.conftest import TOP, record_dataset, with_rows_beyond
from tests.parquet import change_column, data_file, episodes_file

STATISTICS = {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}


def opened(root, **options) -> LeRobotDataset:
    return LeRobotDataset("local/column", root=root, video_backend="pyav", return_uint8=True, **options)


def tokens_of(dataset) -> torch.Tensor:
    return torch.stack(list(dataset.hf_dataset[OBS_LAM_TOKENS]))


def checked(dataset) -> int:
    """Open and check the column of a dataset; its missing tokens."""
    column = read_column(dataset.meta, OBS_LAM_TOKENS)
    return check_values(column, open_column(column, dataset.meta))


@pytest.fixture(scope="module")
def whole(dataset, store):
    """All tokens of `dataset`, `(60, 64)`."""
    return store.window(torch.arange(len(dataset)), [0])[:, 0]


@pytest.fixture(scope="module")
def added(dataset, store, tmp_path_factory):
    return add_column(store, dataset.meta, tmp_path_factory.mktemp("added") / "data")


@pytest.fixture(scope="module")
def column_dataset(added):
    return opened(added.root)


def test_every_frame_has_its_token(column_dataset, dataset, whole):
    assert torch.equal(tokens_of(column_dataset), whole)
    assert torch.equal(column_dataset[30][OBS_LAM_TOKENS], whole[30])
    for key in (TOP, "observation.state", "action", "timestamp"):
        assert torch.equal(column_dataset[30][key], dataset[30][key])
    assert checked(column_dataset) == 5


def test_it_is_read_as_the_visualiser_reads(added, whole):
    """`lerobot-dataset-viz` opens one episode and loads it in batches, in workers."""
    one = opened(added.root, episodes=[2])
    batches = list(DataLoader(one, batch_size=4, num_workers=0))
    assert torch.equal(torch.cat([batch[OBS_LAM_TOKENS] for batch in batches]), whole[23:40])


def test_windows_clamp_like_the_store(added, dataset, store):
    windowed = opened(added.root, delta_timestamps={OBS_LAM_TOKENS: [-0.2, -0.1, 0.0]})
    index = torch.arange(len(dataset))
    found = torch.stack([windowed[i][OBS_LAM_TOKENS] for i in range(len(windowed))])
    assert torch.equal(found, store.window(index, [-2, -1, 0]))


def test_videos_are_the_same_files_unless_copies_are_asked_for(dataset, store, added, tmp_path):
    videos = sorted(path.relative_to(dataset.root) for path in dataset.root.rglob("*.mp4"))
    assert (added.linked, added.copied) == (len(videos), 0)
    assert all(os.path.samefile(dataset.root / path, added.root / path) for path in videos)
    copies = add_column(store, dataset.meta, tmp_path / "copies", copy_videos=True)
    assert (copies.linked, copies.copied) == (0, len(videos))
    for path in videos:
        assert not os.path.samefile(dataset.root / path, copies.root / path)
        assert (dataset.root / path).read_bytes() == (copies.root / path).read_bytes()


def test_where_links_cannot_serve_videos_are_copied(dataset, store, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    made = add_column(store, dataset.meta, tmp_path / "data")
    assert (made.linked, made.copied) == (0, 1)
    assert opened(made.root)[30][TOP].any()


def test_files_of_the_hub_cache_are_linked_not_the_links_to_them(dataset, store, tmp_path):
    """The Hub's snapshots consist of relative symbolic links into its blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(dataset.root, snapshot)
    blobs.mkdir()
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    made = add_column(store, opened(snapshot).meta, tmp_path / "data")
    assert not any(path.is_symlink() for path in made.root.rglob("*"))
    assert opened(made.root)[30][TOP].any()


def test_statistics_are_those_that_lerobot_recomputes(column_dataset, added, tmp_path):
    written = json.loads((added.root / "meta" / "stats.json").read_text())
    assert set(written[OBS_LAM_TOKENS]) == STATISTICS
    copy = shutil.copytree(added.root, tmp_path / "copy")
    recompute_stats(opened(copy))
    again = json.loads((copy / "meta" / "stats.json").read_text())
    for name in STATISTICS:
        np.testing.assert_array_equal(written[OBS_LAM_TOKENS][name], again[OBS_LAM_TOKENS][name])
    tokens = tokens_of(column_dataset).double()
    np.testing.assert_allclose(written[OBS_LAM_TOKENS]["mean"], tokens.mean(0), atol=1e-6)
    np.testing.assert_allclose(written[OBS_LAM_TOKENS]["std"], tokens.std(0, correction=0), atol=1e-6)


def test_other_statistics_and_files_stay(added, dataset):
    old, new = (json.loads((root / "meta" / "stats.json").read_text()) for root in (dataset.root, added.root))
    assert old == {name: value for name, value in new.items() if name != OBS_LAM_TOKENS}
    old, new = (json.loads((root / "meta" / "info.json").read_text()) for root in (dataset.root, added.root))
    del new["features"][OBS_LAM_TOKENS]
    assert old == new


def test_the_column_says_what_its_tokens_are(column_dataset, store):
    column = read_column(column_dataset.meta, OBS_LAM_TOKENS)
    assert column.derived is None
    assert column.provenance == store.provenance
    info = column_dataset.meta.features[OBS_LAM_TOKENS]["info"]
    assert info["lam"]["fingerprint"] == store.provenance.lam.fingerprint
    assert info["frame_stride"] == 1
    assert info["token_kind"] == "vq"


def test_deleted_episodes(column_dataset, added, whole, tmp_path):
    """LeRobot re-encodes the video, which episodes share."""
    edited = delete_episodes(column_dataset, [1, 3], output_dir=tmp_path / "edited", repo_id="local/edited")
    expected = torch.cat([whole[:14], whole[23:40], whole[48:]])
    assert torch.equal(tokens_of(edited), expected)
    assert checked(edited) == 3
    column = read_column(edited.meta, OBS_LAM_TOKENS)
    assert "derived: meta/lam_tokens.json says nothing" in column.state
    np.testing.assert_allclose(edited.meta.stats[OBS_LAM_TOKENS]["mean"], expected.mean(0), atol=1e-6)


@pytest.mark.slow
def test_an_edit_in_place_by_lerobot_edit_dataset(dataset, store, whole, tmp_path):
    """The original and its video, which the edited dataset shared, stay as they are."""
    made = add_column(store, dataset.meta, tmp_path / "data")
    video = next(dataset.root.rglob("*.mp4"))
    before = video.read_bytes()
    operation = DeleteEpisodesConfig(episode_indices=[0])
    place = {"root": str(made.root), "new_root": str(made.root)}
    edit_dataset(EditDatasetConfig(operation, repo_id="local/column", **place))
    edited = opened(made.root)
    assert torch.equal(tokens_of(edited), whole[14:])
    assert read_column(edited.meta, OBS_LAM_TOKENS).derived is not None
    assert video.read_bytes() == before


def test_a_video_that_is_encoded_again_in_place(dataset, store, whole, tmp_path):
    made = add_column(store, dataset.meta, tmp_path / "data", copy_videos=True)
    reencode_dataset(opened(made.root), rgb_encoder=RGBEncoderConfig(vcodec="h264", crf=30))
    again = opened(made.root)
    assert torch.equal(tokens_of(again), whole)
    assert read_column(again.meta, OBS_LAM_TOKENS).state == f"derived: the video of {TOP} was encoded again"


@pytest.mark.slow
def test_a_split_and_its_merge(column_dataset, whole, tmp_path):
    parts = split_dataset(column_dataset, {"a": [0, 1], "b": [2, 3, 4]}, output_dir=tmp_path / "parts")
    assert torch.equal(tokens_of(parts["a"]), whole[:23])
    assert torch.equal(tokens_of(parts["b"]), whole[23:])
    merged = merge_datasets([parts["b"], parts["a"]], "local/merged", tmp_path / "merged")
    assert torch.equal(tokens_of(merged), torch.cat([whole[23:], whole[:23]]))
    assert checked(merged) == 5
    assert "derived" in read_column(merged.meta, OBS_LAM_TOKENS).state
    edited = delete_episodes(merged, [0], output_dir=tmp_path / "edited", repo_id="local/edited")
    assert torch.equal(tokens_of(edited), torch.cat([whole[40:], whole[:23]]))
    assert OBS_LAM_TOKENS in edited.meta.stats


@pytest.mark.slow
def test_two_datasets_merge_if_one_lam_made_their_tokens(column_dataset, whole, make_store, tmp_path):
    other = record_dataset(tmp_path / "other", lengths=(6, 7), seed=5)
    theirs = make_store(other)
    added = opened(add_column(theirs, other.meta, tmp_path / "theirs").root)
    merged = merge_datasets([column_dataset, added], "local/merged", tmp_path / "merged")
    assert torch.equal(tokens_of(merged), torch.cat([whole, theirs.window(torch.arange(13), [0])[:, 0]]))
    assert checked(merged) == 7
    strides = make_store(other, frame_stride=2)
    strange = opened(add_column(strides, other.meta, tmp_path / "strange").root)
    with pytest.raises(ValueError, match="Same features is expected"):  # LeRobot's
        merge_datasets([column_dataset, strange], "local/both", tmp_path / "both")


def test_lerobot_removes_the_column(column_dataset, dataset, tmp_path):
    plain = remove_feature(column_dataset, OBS_LAM_TOKENS, output_dir=tmp_path / "plain", repo_id="local/x")
    assert plain.meta.features == dataset.meta.features
    old, new = (json.loads((d.root / "meta" / "stats.json").read_text()) for d in (dataset, plain))
    assert old == new
    assert plain.hf_dataset.column_names == dataset.hf_dataset.column_names
    for key in ("observation.state", "action", "index", "timestamp"):
        old, new = (torch.stack(list(of.hf_dataset[key])) for of in (dataset, plain))
        assert torch.equal(old, new)
    assert torch.equal(opened(plain.root)[30][TOP], dataset[30][TOP])


def test_a_column_is_added_to_what_it_was_removed_from(column_dataset, store, whole, tmp_path):
    plain = remove_feature(column_dataset, OBS_LAM_TOKENS, output_dir=tmp_path / "plain", repo_id="local/x")
    again = opened(add_column(store, plain.meta, tmp_path / "again").root)
    assert torch.equal(tokens_of(again), whole)
    assert read_column(again.meta, OBS_LAM_TOKENS).derived is None


def test_two_columns(column_dataset, make_store, dataset, tmp_path):
    second = make_store(dataset, use_vq_tokens=False, frame_stride=3)
    both = opened(add_column(second, column_dataset.meta, tmp_path / "both", "observation.lam_slow").root)
    for key, kind, stride in ((OBS_LAM_TOKENS, "vq", 1), ("observation.lam_slow", "continuous", 3)):
        column = read_column(both.meta, key)
        assert (column.kind, column.frame_stride, column.derived) == (kind, stride, None)
    column = read_column(both.meta, "observation.lam_slow")
    assert check_values(column, open_column(column, both.meta)) == 15


@pytest.mark.slow
def test_a_dataset_of_images_in_several_files(make_store, tmp_path):
    images = record_dataset(tmp_path / "images", lengths=(6, 5), use_videos=False)
    images.meta.update_chunk_settings(data_files_size_in_mb=1)
    store = make_store(images)
    made = add_column(store, images.meta, tmp_path / "column")
    assert (made.linked, made.copied) == (0, 0)
    column = opened(made.root)
    assert torch.equal(tokens_of(column), store.window(torch.arange(11), [0])[:, 0])
    assert torch.equal(column[7][TOP], images[7][TOP])
    edited = delete_episodes(column, [0], output_dir=tmp_path / "edited", repo_id="local/edited")
    assert torch.equal(tokens_of(edited), store.window(torch.arange(6, 11), [0])[:, 0])


def refused(error, message, *arguments, **options):
    with pytest.raises(error, match=message):
        add_column(*arguments, **options)


def test_what_is_refused(dataset, store, partial_store, added, column_dataset, tmp_path):
    output = tmp_path / "data"
    refused(UserError, r"is partial \(it covers 2 of 5 episodes", partial_store, dataset.meta, output)
    other = record_dataset(tmp_path / "other", seed=1)
    refused(TokenStoreError, "does not belong to dataset", store, other.meta, output)
    refused(UserError, "has a column 'observation.lam_tokens' already", store, column_dataset.meta, output)
    for name in ("lam_tokens", "observation.", "observation.a/b", "observation.images.x", "observation.a b"):
        refused(UserError, "must be 'observation.' and|is a name by which", store, dataset.meta, output, name)
    refused(FileExistsError, "exists already and is not empty", store, dataset.meta, added.root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_dataset_that_is_not_whole(dataset, store, tmp_path):
    copy = shutil.copytree(dataset.root, tmp_path / "copy")
    next(copy.rglob("*.mp4")).unlink()
    meta = LeRobotDatasetMetadata("local/x", root=copy)
    refused(DatasetError, r"is not whole: videos/.* is not there", store, meta, tmp_path / "x")


def test_nothing_is_left_where_the_disk_is_full(dataset, store, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    refused(OSError, "No space left", store, dataset.meta, tmp_path / "data", copy_videos=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (30, float("nan"), "NaN or Inf in token row 30"),
        (14, 1.0, "1 frames less than 1 after their episode's start have a token, the first is frame 14"),
        (15, 0.0, r"1 frames that should have a token have none \(zeros\), the first is frame 15"),
    ],
)
def test_bad_values_are_found(added, tmp_path, row, value, message):
    copy = shutil.copytree(added.root, tmp_path / "copy")
    change_column(
        data_file(copy),
        OBS_LAM_TOKENS,
        lambda tokens: [*tokens[:row], [value] * 64, *tokens[row + 1 :]],
    )
    with pytest.raises(UserError, match=message):
        checked(opened(copy))


def test_rows_are_those_that_lerobot_reads(dataset, store, tmp_path):
    """Rows beyond the last episode, a `frame_index` that never restarts, `data/file_index` of no file."""
    root = with_rows_beyond(dataset, tmp_path / "data")
    change_column(root / "data" / "chunk-000" / "file-000.parquet", "frame_index", range(60))
    change_column(episodes_file(root), "data/file_index", [0, 0, 0, 2, 2])
    made = add_column(store, LeRobotDatasetMetadata("local/x", root=root), tmp_path / "column")
    meta = LeRobotDatasetMetadata("local/column", root=made.root)
    column = read_column(meta, OBS_LAM_TOKENS)
    opened_column = open_column(column, meta)
    assert torch.equal(opened_column.values, store.window(torch.arange(60), [0])[:, 0])
    assert check_values(column, opened_column) == 5
    plain = add_column(store, dataset.meta, tmp_path / "plain")
    for name in ("mean", "std", "count"):
        there, here = (load_stats(each.root)[OBS_LAM_TOKENS][name] for each in (plain, made))
        assert (there == here).all()


def test_rows_in_another_order_are_refused(dataset, store, tmp_path):
    root = shutil.copytree(dataset.root, tmp_path / "data")
    pq.write_table(pq.read_table(data_file(root)).take([1, 0, *range(2, 60)]), data_file(root))
    meta = LeRobotDatasetMetadata("local/x", root=root)
    old = shutil.copytree(store.path, tmp_path / "old")  # made before a store knew its dataset's frames
    document = json.loads((old / "lam_tokens.json").read_text())
    document["dataset"]["frames"] = ""
    (old / "lam_tokens.json").write_text(json.dumps(document))
    refused(DatasetError, r"row 0 of .* is called frame 1", TokenStore.open(old), meta, tmp_path / "x")
    refused(TokenStoreError, r"does not belong to dataset", store, meta, tmp_path / "x")
