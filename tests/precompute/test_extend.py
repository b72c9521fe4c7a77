"""A grown or edited dataset: episodes whose frames are provably the same are copied, the others encoded."""

import json
import shutil

import pytest
import torch
from lerobot.datasets.dataset_tools import delete_episodes
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.torch import load_file, save_file

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.episode_hashes import are_known, episode_hashes
from lerobot_lam_diffusion.utils.errors import ExtractionError
from lerobot_lam_diffusion.utils.files import sha256_of
from tests.conftest import TOP, record_dataset, record_more, write_lam
from tests.parquet import change_column, episodes_file

LENGTHS = (9, 7, 8)


def opened(root) -> LeRobotDataset:
    return LeRobotDataset("local/squares", root=root, video_backend="pyav", return_uint8=True)


@pytest.fixture(scope="module")
def extract(tmp_path_factory, lam, lam_folder):
    def make(dataset, with_lam=lam, **options):
        folder = tmp_path_factory.mktemp("extended") / "store"
        given = {"camera_key": TOP, "lam_path": str(lam_folder), "batch_size": 8, "show_progress": False}
        return precompute_tokens(dataset, with_lam, folder, **{**given, **options})

    return make


def same_files(one: TokenStore, other: TokenStore) -> bool:
    return all(
        (one.path / name).read_bytes() == (other.path / name).read_bytes()
        for name in ("lam_tokens.safetensors", "lam_tokens.json")
    )


@pytest.mark.parametrize(
    "use_videos", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["video", "images"]
)
def test_a_grown_dataset_has_the_bytes_of_a_fresh_extraction(use_videos, tmp_path, extract):
    old = record_dataset(tmp_path / "old", lengths=LENGTHS, use_videos=use_videos)
    before = extract(old).store
    new = record_more(tmp_path / "new", old)
    extended = extract(new, extend=[before])
    assert (extended.copied, extended.encoded) == (3, 5 + 4)
    assert same_files(extended.store, extract(new).store)
    TokenStore.open(extended.store.path, new.meta)


@pytest.mark.slow
def test_copied_episodes_take_no_memory_until_their_shard_is_begun(tmp_path, extract, lam):
    """Shards whose episodes are all copied are written at once; in the others the rest is encoded."""
    old = record_dataset(tmp_path / "old", lengths=LENGTHS)
    new = record_more(tmp_path / "new", old)
    extended = extract(new, extend=[extract(old).store], shard_frames=10)
    assert extended.copied == 3
    assert same_files(extended.store, extract(new, shard_frames=10).store)


@pytest.mark.slow
def test_an_episode_shorter_than_the_stride(tmp_path, extract):
    old = record_dataset(tmp_path / "old", lengths=(9, 2, 8))
    new = record_more(tmp_path / "new", old)
    extended = extract(new, extend=[extract(old, frame_stride=4).store], frame_stride=4)
    assert extended.copied == 3
    assert same_files(extended.store, extract(new, frame_stride=4).store)


@pytest.mark.slow
def test_a_video_in_several_files(tmp_path, extract):
    old = record_dataset(tmp_path / "old", lengths=LENGTHS, file_size_mb=0.001)
    new = record_more(tmp_path / "new", old)
    extended = extract(new, extend=[extract(old).store], frame_stride=1)
    assert extended.copied == 3
    assert same_files(extended.store, extract(new).store)


def test_episodes_are_found_wherever_they_lie_now(tmp_path, extract, dataset):
    edited = delete_episodes(dataset, [0, 2], output_dir=tmp_path / "edited", repo_id="local/squares")
    edited = opened(edited.root)
    before = extract(dataset).store
    extended = extract(edited, extend=[before])
    assert same_files(extended.store, extract(edited).store)
    again = extract(dataset, extend=[extended.store])  # and back
    assert again.copied == extended.copied
    assert same_files(again.store, before)


def test_other_frames_are_encoded_again(tmp_path, extract):
    old = record_dataset(tmp_path / "old", lengths=LENGTHS)
    other = record_dataset(tmp_path / "other", lengths=LENGTHS, seed=1)
    extended = extract(other, extend=[extract(old).store])
    assert extended.copied == 0
    assert same_files(extended.store, extract(other).store)


def test_hashes_follow_from_frames_and_their_order(tmp_path, dataset):
    hashes = episode_hashes(dataset.meta, TOP)
    assert are_known(hashes).all()
    assert len(set(map(bytes, hashes.numpy()))) == len(hashes)
    copied = opened(shutil.copytree(dataset.root, tmp_path / "copy"))
    assert torch.equal(episode_hashes(copied.meta, TOP), hashes)
    (video,) = (tmp_path / "copy" / "videos").rglob("*.mp4")
    video.unlink()
    assert not are_known(episode_hashes(copied.meta, TOP)).any()


def test_a_shifted_episode_has_another_hash(tmp_path, dataset):
    root = shutil.copytree(dataset.root, tmp_path / "shifted")
    name = f"videos/{TOP}/from_timestamp"
    change_column(episodes_file(root), name, lambda start: [start[0], start[1] + 0.1, *start[2:]])
    here, there = episode_hashes(opened(root).meta, TOP), episode_hashes(dataset.meta, TOP)
    assert (here != there).any(1).tolist() == [False, True, False, False, False]


def test_tokens_that_were_made_otherwise_are_refused(tmp_path, extract, dataset, frames, store):
    other_lam = load_lam(write_lam(tmp_path / "lam", frames, seed=3))
    with pytest.raises(ExtractionError, match=r"frame_stride is 1, expected 2"):
        extract(dataset, extend=[store], frame_stride=2)
    with pytest.raises(ExtractionError, match=r"lam\.fingerprint is"):
        extract(dataset, with_lam=other_lam, extend=[store])
    options = {"use_vq_tokens": False, "storage_dtype": "int8"}
    rounded = extract(dataset, **options).store
    with pytest.raises(ExtractionError, match=r"would be rounded twice"):
        extract(dataset, extend=[rounded], **options)


def test_a_store_that_does_not_know_its_frames_is_refused(tmp_path, extract, dataset, store):
    old = shutil.copytree(store.path, tmp_path / "old")
    tensors = load_file(old / "lam_tokens.safetensors")
    del tensors["episode_hash"]
    save_file(tensors, old / "lam_tokens.safetensors")
    document = json.loads((old / "lam_tokens.json").read_text())
    document |= {"format_version": 2, "tensors_sha256": sha256_of(old / "lam_tokens.safetensors")}
    (old / "lam_tokens.json").write_text(json.dumps(document))
    with pytest.raises(ExtractionError, match=r"before stores knew each episode's frames"):
        extract(dataset, extend=[TokenStore.open(old)])
