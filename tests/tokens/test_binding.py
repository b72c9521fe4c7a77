"""A store is used with the frames that it was made of, and with no other dataset.

`tests/precompute/test_edited_datasets.py` edits datasets at random and compares every token that is accepted.
"""

import json
import logging
import shutil

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets.dataset_tools import convert_image_to_video_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.binding import dataset_digest
from lerobot_lam_diffusion.tokens.episode_hashes import are_known, codec_name, episode_hashes
from lerobot_lam_diffusion.tokens.frames_digest import frames_digest
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import EPISODE_LENGTHS, TOP, record_dataset
from tests.parquet import change_column, data_file, episodes_file

WRIST = "observation.images.wrist"


def opened(root) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata("local/squares", root=root)


def refusal(store, meta) -> str:
    with pytest.raises(TokenStoreError) as error:
        TokenStore.open(store.path, meta)
    told = str(error.value)
    assert str(store.path) in told
    assert f"does not belong to dataset {meta.repo_id!r}" in told
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


@pytest.mark.parametrize("changes", [{"seed": 1}, {"lengths": EPISODE_LENGTHS[::-1]}], ids=["pixels", "cut"])
def test_dataset_of_as_many_frames_with_other_content(store, tmp_path, changes):
    other = record_dataset(tmp_path / "other", **changes)
    assert other.meta.total_frames == store.num_frames
    assert "episodes differ from those that the tokens were made of" in refusal(store, other.meta)


def test_other_fps(store, copied_root):
    info = copied_root / "meta" / "info.json"
    info.write_text(info.read_text().replace('"fps": 10', '"fps": 20'))
    assert "it has 10 fps, the dataset 20" in refusal(store, opened(copied_root))


def test_all_differences_are_told_at_once(store, tmp_path):
    told = refusal(store, record_dataset(tmp_path / "other", lengths=(4,), cameras=(WRIST,)).meta)
    assert "3 problems" in told
    assert "it has 60 frames, the dataset 4" in told
    assert "it has 5 episodes, the dataset 1" in told
    assert f"its camera {TOP!r} is not among the dataset's cameras ['{WRIST}']" in told


def test_images_that_became_video_are_other_frames(tmp_path, make_store):
    """LeRobot's converter carries the statistics over; the video's pixels are not those of the images."""
    images = record_dataset(tmp_path / "images", lengths=(4, 3, 4), use_videos=False)
    store = make_store(images)
    video = convert_image_to_video_dataset(
        images, output_dir=tmp_path / "video", repo_id="local/video", num_workers=1
    )
    assert "frames" in refusal(store, video.meta)


# --- the digest of the frames


@pytest.mark.parametrize("use_videos", [True, False], ids=["video", "images"])
def test_changed_in_place_is_found_after_it_was_noted(tmp_path, use_videos):
    root = record_dataset(tmp_path / "data", lengths=(4, 3), use_videos=use_videos).root
    before = frames_digest(opened(root), TOP)
    assert before is not None
    assert frames_digest(opened(root), TOP) == before
    change_column(data_file(root), "timestamp", lambda times: times[::-1])
    assert frames_digest(opened(root), TOP) != before
    data_file(root).unlink()
    assert frames_digest(opened(root), TOP) is None


def test_images_beside_the_data_files_are_read_each_time(tmp_path):
    """No note is kept of them: what a note is believed by are the data files' sizes and times."""
    root = record_dataset(tmp_path / "data", lengths=(4, 3), use_videos=False).root

    def beside(images):
        for number, image in enumerate(images):
            (root / f"{number}.png").write_bytes(image["bytes"])
        return [{"bytes": None, "path": f"{number}.png"} for number in range(len(images))]

    change_column(data_file(root), TOP, beside)
    digest, hashes = frames_digest(opened(root), TOP), episode_hashes(opened(root), TOP)
    assert are_known(hashes).all()
    (root / "5.png").write_bytes((root / "4.png").read_bytes())
    assert frames_digest(opened(root), TOP) != digest
    assert (episode_hashes(opened(root), TOP) != hashes).any(1).tolist() == [False, True]
    (root / "0.png").unlink()
    assert are_known(episode_hashes(opened(root), TOP)).tolist() == [False, True]


def test_an_episodes_hash_does_not_depend_on_the_decoder():
    assert {codec_name(av.Codec(decoder, "r")) for decoder in ("av1", "libdav1d")} == {"libdav1d"}
    assert [codec_name(av.Codec(decoder, "r")) for decoder in ("h264", "libvpx-vp9")] == ["h264", "vp9"]


# --- the digest of the statistics, for stores of formats 1 and 2 and where files are not on this machine


def test_store_of_format_2_is_bound_as_before_with_one_warning(store, dataset, copied_root, tmp_path, caplog):
    """Also one from before the video's encoding counted, whose digest has no part for it."""
    old = shutil.copytree(store.path, tmp_path / "old")
    document = json.loads((old / "lam_tokens.json").read_text())
    del document["dataset"]["frames"]
    document["format_version"] = 2
    (old / "lam_tokens.json").write_text(json.dumps(document))
    with caplog.at_level(logging.WARNING):
        TokenStore.open(old, dataset.meta)
        TokenStore.open(old, dataset.meta)
    assert caplog.text.count("bound to its dataset by lengths and statistics only") == 1
    assert "lerobot-lam-tokens verify" in caplog.text

    info = copied_root / "meta" / "info.json"
    features = json.loads(info.read_text())
    del features["features"][TOP]["info"]
    info.write_text(json.dumps(features))
    older = dataset_digest(opened(copied_root), TOP)
    assert older != document["dataset"]["digest"]
    document["dataset"]["digest"] = older
    (old / "lam_tokens.json").write_text(json.dumps(document))
    TokenStore.open(old, dataset.meta)


@pytest.mark.parametrize("feature", ["action", "observation.state", TOP])
def test_digest_sees_each_features_statistics(dataset, copied_root, feature):
    """What other recordings of as many frames differ in."""
    meta = opened(copied_root)
    before = dataset_digest(meta, TOP)
    assert before == dataset_digest(dataset.meta, TOP)
    name = f"stats/{feature}/mean"
    change_column(episodes_file(copied_root), name, lambda means: [means[1], means[0], *means[2:]])
    assert dataset_digest(meta, TOP) != before


def test_digest_differs_between_cameras(tmp_path):
    meta = record_dataset(tmp_path / "two", lengths=(4,), cameras=(TOP, WRIST)).meta
    assert dataset_digest(meta, TOP) != dataset_digest(meta, WRIST)


def large(kind):
    return pa.large_list(large(kind.value_type)) if pa.types.is_list(kind) else kind


@pytest.mark.parametrize(
    ("change", "same_digest"),
    [
        (lambda t: t, True),
        (lambda t: t.cast(pa.schema([(f.name, large(f.type)) for f in t.schema])), True),
        (
            lambda t: t.set_column(
                t.column_names.index("length"), "length", t["length"].cast(pa.int32()).dictionary_encode()
            ),
            True,
        ),
        (lambda t: t.select(t.column_names[::-1]), True),
        (lambda t: t.drop_columns([c for c in t.column_names if c.startswith(f"stats/{TOP}/")]), False),
    ],
    ids=["plain", "large lists", "dictionary of int32", "order", "without statistics"],
)
def test_episodes_files_of_several_types(store, dataset, copied_root, change, same_digest):
    """LeRobot may spread `meta/episodes` over several files."""
    file = episodes_file(copied_root)
    table = pq.read_table(file)
    pq.write_table(table[:3], file)
    pq.write_table(change(table[3:]), file.with_name("file-001.parquet"))
    meta = opened(copied_root)
    assert (dataset_digest(meta, TOP) == dataset_digest(dataset.meta, TOP)) == same_digest
    TokenStore.open(store.path, meta)


def test_dataset_of_an_old_layout_is_told_how_to_convert(copied_root):
    meta = opened(copied_root)
    shutil.rmtree(copied_root / "meta" / "episodes")
    with pytest.raises(UserError, match=r"has no meta/episodes/\*\.parquet.*convert_dataset_v21_to_v30"):
        dataset_digest(meta, TOP)
