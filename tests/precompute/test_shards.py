"""A shard is finished when its manifest says so and its bytes agree; anything else is not there."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lerobot_lam_diffusion.precompute.plan import Plan
from lerobot_lam_diffusion.precompute.shards import ShardError, ShardFolder

LENGTHS = [4, 3, 5]


@pytest.fixture
def folder(tmp_path):
    """Two shards (episodes 0 and 1, episode 2), both finished."""
    plan = Plan.make({"x": 1}, [0, 2, 7], LENGTHS, 6)
    assert plan.shards == [(0, 2), (2, 3)]
    shards = ShardFolder(tmp_path, plan, (2,), torch.uint8)
    shards.write(0, torch.arange(14, dtype=torch.uint8).view(7, 2), {2: "its file is gone"})
    shards.write(1, torch.arange(10, dtype=torch.uint8).view(5, 2), {})
    return shards


def test_a_shard_comes_back_as_it_was(folder):
    assert folder.finished() == [0, 1]
    assert len(folder.present()) == 2
    assert folder.check(0) == {2: "its file is gone"}
    assert torch.equal(folder.values(1), torch.arange(10, dtype=torch.uint8).view(5, 2))
    assert sorted(os.listdir(folder.path)) == [
        "00000.json", "00000.safetensors", "00001.json", "00001.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["00001.json", "00001.safetensors"])
def test_a_shard_without_one_of_its_files_is_not_finished(folder, name):
    (folder.path / name).unlink()
    assert folder.finished() == [0]


def test_shards_of_another_plan_are_not_taken_for_this_one(folder):
    other = ShardFolder(folder.path, Plan.make({"x": 2}, [0, 2, 7], LENGTHS, 6), (2,), torch.uint8)
    assert other.finished() == []


def change(**fields):
    return lambda manifest: {**manifest, **fields}


HOSTILE = {
    "list": lambda manifest: [manifest],
    "another shard's": change(shard=0),
    "rows": change(rows=10**15),
    "path": change(shard="../../../etc/passwd"),
    "hash": change(sha256="0" * 64),
    "no hash": change(sha256=None),
    "foreign episode": change(skipped={"3": "x"}),
    "skipped is a list": change(skipped=["7"]),
    "reason is no text": change(skipped={"7": 1}),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_that_lies_is_refused(folder, damage):
    path = folder.path / "00001.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ShardError):
        folder.check(1)
    assert folder.finished() == [0]


@given(which=st.sampled_from(["00001.json", "00001.safetensors"]), data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_noticed_or_harmless(folder, which, data):
    path = folder.path / which
    whole = path.read_bytes()
    values = folder.values(1).clone()
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
        finished = folder.finished()
        assert finished == [0] or torch.equal(folder.values(1), values)
    finally:
        path.write_bytes(whole)


def test_a_link_out_of_the_folder_is_replaced_not_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine"
    elsewhere.write_text("mine")
    for name in ("00001.safetensors", "00001.json"):
        (folder.path / name).unlink()
        (folder.path / name).symlink_to(elsewhere)
    assert folder.finished() == [0]
    folder.write(1, torch.ones(5, 2, dtype=torch.uint8), {})
    assert elsewhere.read_text() == "mine"
    assert folder.finished() == [0, 1]
