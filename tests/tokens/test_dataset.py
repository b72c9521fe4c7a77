"""`LamTokenDataset`: the dataset's own items, each with its tokens."""

import pickle

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import DataLoader

from lerobot_lam_diffusion.tokens import LamTokenDataset, TokenStoreError
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import record_dataset

KEY = "observation.lam_tokens"


def test_items_are_the_datasets_own_plus_their_tokens(dataset, store):
    joined = LamTokenDataset(dataset, store.path, deltas=[-1, 0])
    assert len(joined) == len(dataset)
    for position in (0, 20, 59):
        item, original = joined[position], dataset[position]
        assert set(item) == {*original, KEY}
        assert torch.equal(item["observation.images.top"], original["observation.images.top"])
        assert item[KEY].shape == (2, 64)
        assert torch.equal(item[KEY], store.window(torch.tensor([position]), [-1, 0])[0])
    assert joined[20][KEY].any(1).all()


def test_everything_else_is_the_datasets(dataset, store):
    joined = LamTokenDataset(dataset, store.path)
    assert joined.meta is dataset.meta
    assert joined.num_episodes == 5
    assert joined.features is dataset.features
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = joined.no_such_thing


def test_the_key_is_the_callers_choice(dataset, store):
    assert "observation.other" in LamTokenDataset(dataset, store.path, key="observation.other")[0]


def test_an_episode_subset_is_joined_by_absolute_index(dataset, store, partial_store):
    subset = LeRobotDataset(dataset.repo_id, root=dataset.root, episodes=[3, 1], video_backend="pyav")
    whole, partial = LamTokenDataset(subset, store.path), LamTokenDataset(subset, partial_store.path)
    assert len(whole) == 9 + 8
    for position in range(len(subset)):
        item = whole[position]
        expected = store.window(item["index"], [0])[0]
        assert torch.equal(item[KEY], expected)
        assert torch.equal(partial[position][KEY], expected)


def test_a_frame_that_a_partial_store_lacks(dataset, partial_store):
    joined = LamTokenDataset(dataset, partial_store.path)
    assert joined[14 + 2][KEY].any()
    with pytest.raises(TokenStoreError, match="lacks episode 0, which frame 3 belongs to"):
        joined[3]


@pytest.mark.parametrize("opened", [False, True])
def test_a_store_of_another_dataset_is_refused_before_any_item_is_read(store, tmp_path, opened):
    other = record_dataset(tmp_path / "other", seed=1)
    with pytest.raises(TokenStoreError, match="does not belong to dataset"):
        LamTokenDataset(other, store if opened else store.path)


def test_a_column_of_the_same_name_is_an_error(store, tmp_path):
    column = {KEY: {"dtype": "float32", "shape": (64,), "names": None}}
    native = record_dataset(tmp_path / "native", lengths=(3,), extra=column)
    with pytest.raises(
        UserError, match=r"has a column 'observation\.lam_tokens' already.*train on that column"
    ):
        LamTokenDataset(native, store.path)


def test_it_pickles_with_a_dataset_that_pickles(dataset, store):
    joined = pickle.loads(pickle.dumps(LamTokenDataset(dataset, store.path, deltas=[0, 1])))
    assert torch.equal(joined[9][KEY], store.window(torch.tensor([9]), [0, 1])[0])


@pytest.mark.slow
def test_batches_of_spawned_workers(dataset, store):
    joined = LamTokenDataset(dataset, store.path, deltas=[-1, 0])
    loader = DataLoader(joined, batch_size=16, num_workers=2, multiprocessing_context="spawn")
    seen = []
    for batch in loader:
        assert torch.equal(batch[KEY], store.window(batch["index"], [-1, 0]))
        seen += batch["index"].tolist()
    assert seen == list(range(60))
