"""Partial stores become the store that one extraction would have made, or are refused."""

import os
from dataclasses import replace

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.tokens.merge import merge_stores
from lerobot_lam_diffusion.tokens.writer import write_store

LENGTHS = [4, 3, 5, 2]
KINDS = {
    "vq": {},
    "uint16": {"num_codes": 300},
    "float32": {"token_kind": "continuous", "storage_dtype": "float32"},
    "bfloat16": {"token_kind": "continuous", "storage_dtype": "bfloat16"},
    "int8": {"token_kind": "continuous", "storage_dtype": "int8"},
}


def contents(store) -> list[bytes]:
    return [(store.path / name).read_bytes() for name in (TENSORS_FILE, PROVENANCE_FILE)]


@pytest.fixture
def part_of(tmp_path):
    """Some episodes of a store, as a store: `part_of(whole, [0, 2], "name", camera_key=…)`."""

    def make(whole, episodes, name, hashes=None, **changes):
        covered = torch.zeros(len(whole.episode_row), dtype=torch.bool)
        covered[episodes] = True
        frame, _ = whole.frames_at(torch.arange(len(whole.values)))
        kept = covered[torch.searchsorted(whole.episode_from, frame, right=True) - 1].nonzero().flatten()
        blocks = [whole.values[kept] if whole.codebook is not None else whole.decode(kept)]
        codebook = torch.empty(0) if whole.codebook is None else whole.codebook
        provenance = replace(whole.provenance, **changes)
        start, stop = whole.episode_from, whole.episode_to
        return write_store(tmp_path / name, provenance, blocks, codebook, start, stop, covered, hashes)

    return make


def refusal(stores, folder) -> str:
    with pytest.raises(TokenStoreError, match="the stores cannot be merged") as error:
        merge_stores(stores, folder)
    assert not folder.exists()
    return str(error.value)


def test_where_a_store_is_being_extracted_no_other_is_put(store, tmp_path):
    (tmp_path / "new.shards").mkdir()
    with pytest.raises(FileExistsError, match="a store is being extracted into"):
        merge_stores([store], tmp_path / "new")


def test_extracted_in_parts_or_in_one_go_is_the_same_to_the_byte(
    store, partial_store, dataset, make_store, tmp_path
):
    rest = make_store(
        LeRobotDataset(dataset.repo_id, root=dataset.root, episodes=[4, 0, 2, 3], video_backend="pyav")
    )
    for name, stores in {"a": [partial_store, rest], "b": [rest, partial_store, rest]}.items():
        assert contents(merge_stores(stores, tmp_path / name)) == contents(store)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_copied_as_they_are_kept(write_random, part_of, tmp_path, kind):
    whole = write_random(tmp_path / "whole", LENGTHS, **KINDS[kind])
    one, other = part_of(whole, [1, 2], "one"), part_of(whole, [0], "other")
    merged = merge_stores([one, other], tmp_path / "merged")
    assert merged.missing_episodes == [3]
    index = torch.arange(12)
    parts = torch.cat([other.window(index[:4], [-1, 0]), one.window(index[4:], [-1, 0])])
    assert torch.equal(merged.window(index, [-1, 0]), parts)
    assert merged.provenance.max_error == max(one.provenance.max_error, other.provenance.max_error)
    again = merge_stores([other, one], tmp_path / "again")
    assert contents(again)[0] == contents(merged)[0]


def test_every_difference_is_told_at_once(write_random, part_of, tmp_path):
    whole = write_random(tmp_path / "whole", LENGTHS)
    lam = replace(whole.provenance.lam, fingerprint="another")
    other = part_of(whole, [1], "other", camera_key="wrist", frame_stride=2, lam=lam, device="cuda")
    told = refusal([whole, other], tmp_path / "merged")
    assert "4 problems" in told
    for difference in (
        "lam.fingerprint is 'another', expected 'fingerprint'",
        "camera_key is 'wrist', expected 'observation.images.top'",
        "frame_stride is 2, expected 1",
        "device is 'cuda', expected 'unknown'",
    ):
        assert f"{other.path}: {difference} as in {whole.path}" in told


def test_another_kind_codebook_or_storage(write_random, part_of, tmp_path):
    vq, int8 = (write_random(tmp_path / kind, LENGTHS, **KINDS[kind]) for kind in ("vq", "int8"))
    float32 = write_random(tmp_path / "float32", LENGTHS, **KINDS["float32"])
    assert "token_kind is 'continuous', expected 'vq'" in refusal([vq, int8], tmp_path / "merged")
    assert "storage_dtype is 'float32', expected 'int8'" in refusal([int8, float32], tmp_path / "merged")
    provenance = replace(vq.provenance)
    every = torch.ones(4, dtype=torch.bool)
    other = write_store(
        tmp_path / "other", provenance, [vq.values], vq.codebook + 1, vq.episode_from, vq.episode_to, every
    )
    assert f"{other.path} has another codebook than {vq.path}" in refusal([vq, other], tmp_path / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_two_accounts_of_an_episode(write_random, part_of, tmp_path, kind):
    whole = write_random(tmp_path / "whole", LENGTHS, **KINDS[kind])
    twice = part_of(whole, [1, 2], "twice")
    same = merge_stores([whole, twice], tmp_path / "same") if kind != "int8" else whole
    assert torch.equal(same.values, whole.values)
    changed = TokenStore.open(whole.path)
    changed.values = whole.values.int() + (torch.arange(14) == 8).unsqueeze(1)
    if whole.codebook is None:
        changed.codebook = changed.row_scale = None
    else:
        changed.values %= 16
    other = part_of(changed, [1, 2, 3], "changed")
    told = refusal([whole, other], tmp_path / "merged")
    assert "have different tokens of episode" in told
    assert "lerobot-lam-tokens verify" in told


def test_what_any_store_knows_of_an_episodes_frames_is_kept(write_random, part_of, tmp_path):
    whole = write_random(tmp_path / "whole", LENGTHS)
    hashes = torch.arange(1, 5, dtype=torch.uint8).unsqueeze(1).expand(4, 16).contiguous()
    of_some = hashes * torch.tensor([[1], [1], [0], [0]], dtype=torch.uint8)
    of_others = hashes * torch.tensor([[0], [1], [1], [0]], dtype=torch.uint8)
    stores = [
        part_of(whole, [0], "one", of_some),
        part_of(whole, [1, 2], "other", of_others),
        part_of(whole, [3], "without"),
    ]
    merged = merge_stores(stores, tmp_path / "merged")
    assert merged.episode_hash[:, 0].tolist() == [1, 2, 3, 0]


def test_an_episode_that_one_store_skipped_and_another_covers(write_random, part_of, tmp_path):
    whole = write_random(tmp_path / "whole", LENGTHS)
    one = part_of(whole, [0, 1], "one", skipped={"2": "cut", "3": "cut"})
    other = part_of(whole, [2], "other", skipped={"3": "no such file"})
    merged = merge_stores([one, other], tmp_path / "merged")
    assert merged.skipped == {3: "cut"}
    assert merge_stores([merged, part_of(whole, [3], "last")], tmp_path / "all").skipped == {}


def test_versions_that_differ_are_all_told(write_random, part_of, tmp_path):
    whole = write_random(tmp_path / "whole", LENGTHS, versions={"torch": "2.10", "lerobot": "0.6.1"})
    other = part_of(whole, [2], "other", versions={"torch": "2.11", "lerobot": "0.6.1"})
    told = merge_stores([whole, other], tmp_path / "merged").provenance.versions
    assert told == {"torch": "2.10, 2.11", "lerobot": "0.6.1"}


def test_what_is_there_already_is_not_touched(write_random, tmp_path):
    whole = write_random(tmp_path / "whole", LENGTHS)
    with pytest.raises(FileExistsError):
        merge_stores([whole], whole.path)
    assert os.listdir(tmp_path) == ["whole"]


def test_episodes_of_other_frames_that_the_first_store_does_not_know(write_random, part_of, tmp_path):
    whole = write_random(tmp_path / "whole", LENGTHS)
    hashes = torch.ones(4, 16, dtype=torch.uint8)
    without = part_of(whole, [3], "without")
    one, other = part_of(whole, [0, 1], "one", hashes), part_of(whole, [2], "other", hashes + 1)
    assert f"{other.path} was made of other frames than the stores before it" in refusal(
        [without, one, other], tmp_path / "merged"
    )


def test_stores_of_datasets_with_other_numbers_of_episodes(write_random, tmp_path):
    stores = [write_random(tmp_path / f"of_{n}", LENGTHS[:n]) for n in (3, 4)]
    assert "has other episode boundaries than" in refusal(stores, tmp_path / "merged")
