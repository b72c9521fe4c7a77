"""Where several runs extract into one folder: launches, tasks of a job array, and runs with other inputs."""

import os
import shutil

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.merge import merge_shards, merge_unfinished
from lerobot_lam_diffusion.precompute.processes import Process
from lerobot_lam_diffusion.precompute.shards import PLAN_FILE, ShardFolder
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.layout import unfinished_folder
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import EPISODE_LENGTHS, write_lam
from tests.precompute.conftest import Wrapped


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"frame_stride": 2}, "frame_stride is 1, expected 2"),
        ({"use_vq_tokens": False}, "token_kind is 'vq', expected 'continuous'"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_inputs_than_what_lies_there_are_refused(extract, tmp_path, changes, told, finished):
    first = Process(num_shards=1 if finished else 2)
    extract(process=first, shard_frames=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        extract(**changes)
    assert told in str(error.value)
    assert "choose another --output_dir" in str(error.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_another_lam_or_other_episodes_are_refused(extract, dataset, frames, tmp_path):
    extract(process=Process(num_shards=2), shard_frames=1)
    other = load_lam(write_lam(tmp_path / "other", frames, seed=7))
    with pytest.raises(UserError, match=r"lam\.fingerprint is"):
        extract(other)
    some = LeRobotDataset(dataset.repo_id, root=dataset.root, episodes=[0, 1], video_backend="pyav")
    with pytest.raises(UserError, match="it has 5 episodes, expected 2"):
        extract(of=some)


def test_an_unfinished_store_says_so_when_it_is_opened(extract, tmp_path):
    extract(process=Process(num_shards=2), shard_frames=1)
    with pytest.raises(TokenStoreError, match=r"its extraction is unfinished .*run the same"):
        TokenStore.open(tmp_path / "store")


@pytest.fixture
def begun(extract, tmp_path):
    """The folder of an extraction of which one of two processes made its part."""
    extract(process=Process(num_shards=2), shard_frames=1)
    return unfinished_folder(tmp_path / "store")


@pytest.mark.parametrize("part", ["codebook", "provenance"])
def test_a_plan_that_was_altered_is_refused(extract, begun, tmp_path, part):
    plan = begun / PLAN_FILE
    content = plan.read_bytes()
    if part == "codebook":
        content = content[:-1] + bytes([content[-1] ^ 1])
    else:
        content = content.replace(b'frame_stride\\": 1', b'frame_stride\\": 2', 1)
    assert content != plan.read_bytes()
    plan.write_bytes(content)
    for resume in (extract, lambda: merge_unfinished(tmp_path / "store")):
        with pytest.raises(UserError, match=r"plan\.safetensors is damaged: its SHA-256 is"):
            resume()


def test_other_pixels_or_another_storage_are_other_inputs(extract, begun, tmp_path):
    with pytest.raises(UserError, match="decoder is 'pyav', expected 'torchcodec'"):
        extract(video_backend="torchcodec")
    extract()
    with pytest.raises(UserError, match="decoder is 'pyav', expected 'torchcodec'"):
        extract(video_backend="torchcodec")
    other = tmp_path / "continuous"
    extract(output_dir=other, use_vq_tokens=False, process=Process(num_shards=2), shard_frames=1)
    with pytest.raises(UserError, match="storage_dtype is 'float32', expected 'int8'"):
        extract(output_dir=other, use_vq_tokens=False, storage_dtype="int8")


def test_a_straggler_whose_shards_were_merged_meanwhile_leaves_nothing_behind(extract, lam, store, tmp_path):
    """It has finished a shard before another launch makes the rest, merges, and removes the folder."""
    calls = []

    def overtake(prev, cur):
        calls.append(len(cur))
        if len(calls) == 3:
            extract(shard_frames=1)
        return lam.encode_pairs(prev, cur)

    summary = extract(Wrapped(lam, overtake), shard_frames=1, num_workers=0, process=Process(num_shards=2))
    assert len(calls) >= 3
    assert torch.equal(summary.store.values, store.values)
    assert os.listdir(tmp_path) == ["store"]


def test_damaged_shards_of_a_job_array_are_made_again_by_their_tasks(extract, store, tmp_path):
    first, second = (Process(shard_index=index, num_shards=2) for index in range(2))
    extract(shard_frames=1, process=first, merge=False)
    extract(shard_frames=1, process=second, merge=False)
    shards = sorted((tmp_path / "store.shards").glob("0*.safetensors"))
    for shard in shards[:2]:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    with pytest.raises(UserError, match=r"(?s)2 problems.*00000.*00001.*Run the extraction again"):
        extract(shard_frames=1, process=second)
    assert not (tmp_path / "store").exists()
    assert extract(shard_frames=1, process=second).encoded == EPISODE_LENGTHS[1] - 1
    summary = extract(shard_frames=1, process=first)
    assert summary.encoded == EPISODE_LENGTHS[0] - 1
    assert torch.equal(summary.store.values, store.values)


def test_a_store_that_came_meanwhile_does_not_cost_the_shards(extract, make_store, dataset, tmp_path):
    extract(shard_frames=1, merge=False)
    other = make_store(dataset, frame_stride=2)
    shutil.copytree(other.path, tmp_path / "store")
    with pytest.raises(UserError, match="frame_stride is 2, expected 1"):
        extract(shard_frames=1)
    shards = ShardFolder.open(tmp_path / "store.shards")
    assert merge_shards(shards, tmp_path / "store") is None
    assert shards.progress() == (5, 5)


def test_the_task_of_a_job_array_that_skips_everything(unreadable, extract, tmp_path):
    dataset, path, video = unreadable
    options = {"of": dataset, "skip_unreadable": True, "shard_frames": 1}
    first, second = (Process(shard_index=task, num_shards=2) for task in range(2))
    assert extract(**options, process=first).store is None
    path.write_bytes(video)
    store = extract(**options, process=second).store  # the others' tokens are worth a store
    assert list(store.skipped) == store.missing_episodes
    assert store.num_tokens in (4, 2)


def test_the_last_task_of_a_job_array_says_that_all_was_skipped(unreadable, extract, tmp_path):
    options = {"of": unreadable[0], "skip_unreadable": True, "shard_frames": 1}
    first, second = (Process(shard_index=task, num_shards=2) for task in range(2))
    assert extract(**options, process=first).store is None
    with pytest.raises(UserError, match="all 2 episodes"):
        extract(**options, process=second)
    assert os.listdir(tmp_path) == ["data"]
