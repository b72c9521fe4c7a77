"""Plan and shards: the cut follows from the inputs alone; a file that is not as written is not found."""

import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lerobot_lam_diffusion.precompute.shards import (
    PLAN_FILE,
    Plan,
    ShardCollector,
    ShardError,
    ShardFolder,
    cut_into_shards,
)
from lerobot_lam_diffusion.tokens.provenance import DatasetInfo, LamInfo, Provenance
from lerobot_lam_diffusion.utils.errors import ExtractionError, TokenStoreError

LENGTHS = [4, 1, 3, 5]
EPISODES = [0, 2, 3]  # episode 1 is not asked for
PROVENANCE = Provenance(
    dataset=DatasetInfo("a/dataset", None, sum(LENGTHS), len(LENGTHS), 10.0, "d" * 64),
    lam=LamInfo("a/lam", None, "f" * 64, 2, 8, 16, 1.0),
    camera_key="top",
    frame_stride=1,
    stride_seconds=0.1,
    token_kind="vq",
    dtype="float32",
    versions={},
    storage_dtype="uint8",
)


def make_plan(episodes=EPISODES, shard_frames=6, **changes) -> Plan:
    ends = torch.tensor(LENGTHS).cumsum(0)
    return Plan(
        provenance=Provenance(**{**vars(PROVENANCE), **changes}),
        codebook=torch.arange(128.0).view(16, 8),
        episode_from=ends - torch.tensor(LENGTHS),
        episode_to=ends,
        episode_hash=torch.ones(len(LENGTHS), 16, dtype=torch.uint8),
        episodes=list(episodes),
        shards=cut_into_shards([LENGTHS[episode] for episode in episodes], shard_frames),
    )


VALUES = torch.arange(24, dtype=torch.uint8).view(12, 2)


@pytest.fixture
def folder(tmp_path):
    """Two shards (episodes 0 and 2, episode 3), both finished."""
    shards = ShardFolder.begin(tmp_path / "x.shards", make_plan())
    assert shards.plan.shards == [(0, 2), (2, 3)]
    shards.write(0, VALUES[:7], {2: "its file is gone"})
    shards.write(1, VALUES[7:], {})
    return shards


# --- how the work is cut

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


@given(lengths, st.integers(1, 5000) | st.none())
def test_shards_are_whole_episodes_in_order_each_once(lengths, shard_frames):
    shards = cut_into_shards(lengths, shard_frames)
    assert [episode for first, end in shards for episode in range(first, end)] == list(range(len(lengths)))
    sizes = [sum(lengths[first:end]) for first, end in shards]
    assert all(size >= (shard_frames or 512) for size in sizes[:-1])


# --- the plan of an extraction


def test_a_plan_is_written_once_and_found_again(tmp_path):
    first = ShardFolder.begin(tmp_path / "x.shards", make_plan())
    again = ShardFolder.begin(tmp_path / "x.shards", make_plan(shard_frames=1))
    assert again.plan.shards == first.plan.shards == [(0, 2), (2, 3)]  # the pieces are those that are there
    assert again.digest == first.digest
    plan = ShardFolder.open(tmp_path / "x.shards").plan
    assert (plan.provenance, plan.episodes, plan.lengths) == (PROVENANCE, EPISODES, [4, 3, 5])
    for name in ("codebook", "episode_from", "episode_to", "episode_hash"):
        assert torch.equal(getattr(plan, name), getattr(make_plan(), name))
    assert os.listdir(tmp_path / "x.shards") == [PLAN_FILE]


def test_another_extraction_is_refused_with_every_difference(tmp_path):
    ShardFolder.begin(tmp_path, make_plan())
    with pytest.raises(ExtractionError) as error:
        ShardFolder.begin(tmp_path, make_plan([0], camera_key="wrist", frame_stride=3))
    message = str(error.value)
    assert "camera_key is 'top', expected 'wrist'" in message
    assert "frame_stride is 1, expected 3" in message
    assert "it has 3 episodes, expected 1 (--dataset.episodes differs in 2, 3)" in message
    assert "choose another --output_dir" in message


def test_frames_that_have_changed_since_are_refused(tmp_path):
    ShardFolder.begin(tmp_path, make_plan())
    changed = make_plan()
    changed.episode_hash[2] = 7
    with pytest.raises(ExtractionError, match="the frames of the episodes 2 have changed since"):
        ShardFolder.begin(tmp_path, changed)


def test_a_truncated_plan_is_refused(folder):
    path = folder.path / PLAN_FILE
    content = path.read_bytes()
    for keep in range(len(content)):
        path.write_bytes(content[:keep])
        with pytest.raises(ExtractionError, match="is damaged"):
            ShardFolder.open(folder.path)


def test_a_shard_is_no_plan(folder):
    os.replace(folder.path / "00001.safetensors", folder.path / PLAN_FILE)
    with pytest.raises(ExtractionError, match=r"Remove the folder|extract the tokens again"):
        ShardFolder.open(folder.path)


# --- shards


def test_a_shard_comes_back_as_it_was(folder):
    assert folder.present() == [0, 1]
    assert folder.progress() == (2, 2)
    for shard, (expected, skipped) in enumerate([(VALUES[:7], {2: "its file is gone"}), (VALUES[7:], {})]):
        values, reasons = folder.read(shard)
        assert torch.equal(values, expected)
        assert reasons == skipped
    assert sorted(os.listdir(folder.path)) == ["00000.safetensors", "00001.safetensors", PLAN_FILE]
    folder.discard(1)
    assert folder.present() == [0]


def test_shards_of_another_plan_are_not_taken_for_this_one(folder, tmp_path):
    other = ShardFolder.begin(tmp_path / "other.shards", make_plan(camera_key="wrist"))
    os.replace(folder.path / "00000.safetensors", other.path / "00000.safetensors")
    with pytest.raises(ShardError, match="is of another extraction"):
        other.read(0)


def test_a_shard_in_the_place_of_another_is_refused(folder):
    os.replace(folder.path / "00000.safetensors", folder.path / "00001.safetensors")
    with pytest.raises(ShardError, match="is of another extraction"):
        folder.read(1)


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_noticed_or_harmless(folder, data):
    path = folder.path / "00001.safetensors"
    whole = path.read_bytes()
    content = bytearray(whole)
    match data.draw(st.sampled_from(["flip", "cut", "insert"])):
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "insert":
            at = data.draw(st.integers(0, len(content)))
            content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    path.write_bytes(content)
    try:
        assert torch.equal(folder.read(1)[0], VALUES[7:])
    except ShardError:
        pass
    finally:
        path.write_bytes(whole)


def test_a_process_takes_memory_only_for_shards_in_progress(tmp_path):
    """The second episode, and so the second shard, would take a petabyte."""
    plan = make_plan([0, 1], shard_frames=1)
    ends = torch.tensor([4, 4 + 10**14])
    plan = dataclasses.replace(plan, episode_from=ends - torch.tensor([4, 10**14]), episode_to=ends)
    folder = ShardFolder.begin(tmp_path / "x.shards", plan)
    ShardCollector(folder, [0, 1]).add(torch.tensor([1, 2, 3]), VALUES[1:4])
    assert torch.equal(folder.read(0)[0][1:], VALUES[1:4])


@pytest.mark.parametrize(("value", "storage"), [(1e6, "float16"), (float("nan"), "float32")])
def test_values_that_the_store_could_not_hold_are_refused_at_once(tmp_path, value, storage):
    plan = make_plan(token_kind="continuous", storage_dtype=storage)
    folder = ShardFolder.begin(tmp_path / "x.shards", plan)
    with pytest.raises(TokenStoreError):
        folder.write(0, torch.full((7, 16), value), {})
    assert folder.present() == []


def test_shards_of_episodes_too_short_for_a_pair_are_finished_at_once(tmp_path):
    folder = ShardFolder.begin(tmp_path / "x.shards", make_plan([0, 1], shard_frames=1))
    ShardCollector(folder, [0, 1])
    assert folder.present() == [1]  # episode 1 has a single frame


def test_a_link_out_of_the_folder_is_replaced_not_followed(folder, tmp_path):
    elsewhere = tmp_path / "mine"
    elsewhere.write_text("mine")
    shard = folder.path / "00001.safetensors"
    shard.unlink()
    shard.symlink_to(elsewhere)
    with pytest.raises(ShardError):
        folder.read(1)
    folder.write(1, VALUES[7:], {})
    assert elsewhere.read_text() == "mine"
    assert torch.equal(folder.read(1)[0], VALUES[7:])
