"""The plan follows from the inputs alone, balances the work, and tells what differs."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lerobot_lam_diffusion.precompute.plan import PLAN_FILE, Plan, share_of
from lerobot_lam_diffusion.utils.errors import ExtractionError

IDENTITY = {"camera_key": "top", "frame_stride": 1}

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


def make(lengths, shard_frames=None, identity=IDENTITY) -> Plan:
    return Plan.make(identity, range(len(lengths)), lengths, shard_frames)


@given(lengths, st.integers(1, 5000) | st.none())
def test_shards_are_whole_episodes_in_order_each_once(lengths, shard_frames):
    plan = make(lengths, shard_frames)
    assert [e for first, end in plan.shards for e in range(first, end)] == list(range(len(lengths)))
    assert sum(plan.shard_sizes()) == sum(lengths)
    at_least = shard_frames or 512
    assert all(size >= at_least for size in plan.shard_sizes()[:-1])


@given(lengths, st.integers(1, 7), st.integers(1, 4))
def test_processes_share_all_shards_evenly(lengths, count, launches):
    plan = make(lengths, 1)
    sizes = plan.shard_sizes()
    everything = []
    for launch in range(launches):
        theirs = share_of(sizes, range(len(sizes)), launch, launches)
        shares = [share_of(sizes, theirs, index, count) for index in range(count)]
        everything += [shard for share in shares for shard in share]
        loads = [sum(sizes[shard] for shard in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes)
    assert sorted(everything) == list(range(len(sizes)))


def test_a_plan_is_written_once_and_found_again(tmp_path):
    first = make([5, 6, 7], 10)
    assert first.settle(tmp_path / "x.shards") == first
    assert make([5, 6, 7], 1).settle(tmp_path / "x.shards") == first  # the pieces are those that are there
    assert [path.name for path in (tmp_path / "x.shards").iterdir()] == [PLAN_FILE]


def test_another_extraction_is_refused_with_every_difference(tmp_path):
    make([5, 6]).settle(tmp_path)
    other = Plan.make({"camera_key": "wrist", "frame_stride": 3}, [0], [5], None)
    with pytest.raises(ExtractionError) as error:
        other.settle(tmp_path)
    told = str(error.value)
    assert "its camera_key is 'top', this run's 'wrist'" in told
    assert "its frame_stride is 1, this run's 3" in told
    assert "it extracts 2 episodes, this run 1" in told
    assert "choose another --output_dir" in told


def change(**fields):
    return lambda document: {**document, **fields}


HOSTILE = {
    "not an object": lambda document: [document],
    "newer": change(format_version=2),
    "another format": change(format="x"),
    "identity": change(identity=[]),
    "lengths": change(lengths=[5]),
    "negative length": change(lengths=[5, -6]),
    "huge length": change(lengths=[5, 10**30]),
    "text": change(lengths=["5", "6"]),
    "booleans": change(lengths=[True, True]),
    "no episodes": change(episodes=[], lengths=[], shards=[]),
    "twice": change(episodes=[0, 0]),
    "backwards": change(episodes=[1, 0]),
    "path": change(shards=[["../../etc", 1]]),
    "overlap": change(shards=[[0, 2], [1, 2]]),
    "gap": change(shards=[[0, 1]]),
    "too far": change(shards=[[0, 9]]),
    "empty shard": change(shards=[[0, 0], [0, 2]]),
    "triples": change(shards=[[0, 1, 2]]),
    "shards missing": lambda document: {k: v for k, v in document.items() if k != "shards"},
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_plan_is_refused(tmp_path, damage):
    make([5, 6]).settle(tmp_path)
    document = json.loads((tmp_path / PLAN_FILE).read_text())
    (tmp_path / PLAN_FILE).write_text(json.dumps(damage(document)))
    with pytest.raises(ExtractionError, match=r"is damaged .*Remove the folder"):
        Plan.read(tmp_path / PLAN_FILE)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("plan") / PLAN_FILE
    path.write_bytes(content)
    with pytest.raises(ExtractionError, match="is damaged"):
        Plan.read(path)


def test_a_truncated_plan_is_refused(tmp_path):
    make([5, 6]).settle(tmp_path)
    content = (tmp_path / PLAN_FILE).read_bytes()
    for keep in range(len(content)):
        (tmp_path / PLAN_FILE).write_bytes(content[:keep])
        with pytest.raises(ExtractionError, match="is damaged"):
            Plan.read(tmp_path / PLAN_FILE)
