"""The frames of a batch are those of the store's dataset, or the batch is refused."""

import pytest
import torch
from torch.utils.data import ConcatDataset

from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.tokens import LamTokenDataset, TokenStoreError
from lerobot_lam_diffusion.tokens.batch import check_batch
from lerobot_lam_diffusion.tokens.joined import JoinedStores


@pytest.fixture(params=["one store", "joined"])
def joined(request, tmp_path, write_random):
    stores = [write_random(tmp_path / name, (4, 3, 5)) for name in "ab"]
    return stores[0] if request.param == "one store" else JoinedStores(tuple(stores))


def batch(index, **more):
    return {"index": torch.tensor(index), **{name: torch.tensor(value) for name, value in more.items()}}


def test_frames_of_the_dataset_are_believed(joined):
    check_batch(joined, batch([0, 3, 4, 11], episode_index=[0, 0, 1, 2]))
    check_batch(joined, batch([0, 3], episode_index=[[0], [0]], dataset_index=[0, 0]))
    check_batch(joined, batch([0, 3]))


def test_frames_of_another_dataset(joined):
    with pytest.raises(TokenStoreError, match=r"frame 4 .* episode 0, and in episode 1 .*LamTokenDataset"):
        check_batch(joined, batch([3, 4], episode_index=[0, 0]))


def test_frames_of_several_datasets(joined):
    with pytest.raises(TokenStoreError, match=r"frames of dataset 1 of several.*lerobot-edit-dataset"):
        check_batch(joined, batch([0, 1], episode_index=[0, 0], dataset_index=[0, 1]))


def test_concatenated_datasets_are_wrapped_one_by_one(store, dataset):
    with pytest.raises(UserError, match="not a ConcatDataset"):
        LamTokenDataset(ConcatDataset([dataset, dataset]), store)
