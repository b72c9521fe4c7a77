"""Check, as far as a batch allows, that its frames belong to the dataset that a store was made from."""

from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.joined import JoinedStores
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import TokenStoreError

REMEDY = (
    "A store serves one dataset: wrap each dataset in a LamTokenDataset with its own store before they are "
    "concatenated, or merge the datasets with lerobot-edit-dataset and extract the tokens of the result"
)


def check_batch(store: TokenStore | JoinedStores, batch: dict[str, Any]) -> None:
    """Refuse frames whose episode differs from the one that the store has for their `index`.

    A batch without `episode_index` and `dataset_index` cannot be checked and is not refused. LeRobot's
    pre-processors drop `dataset_index`, so after one of them only different episode boundaries are noticed.

    Args:
        batch: Contains `index`, int64 `(B,)`.

    Raises:
        TokenStoreError: the frames come from several datasets, or from another one.
    """
    first = store.stores[0] if isinstance(store, JoinedStores) else store  # all are of one dataset
    datasets, episodes = batch.get("dataset_index"), batch.get("episode_index")
    if isinstance(datasets, Tensor) and bool((datasets != 0).any()):
        raise TokenStoreError(
            f"the batch has frames of dataset {int(datasets.max())} of several (its dataset_index), and "
            f"token store {first.name} was made of one. {REMEDY}"
        )
    if not isinstance(episodes, Tensor) or episodes.numel() != batch["index"].numel():
        return
    index, episode = torch.stack([batch["index"].reshape(-1), episodes.reshape(-1).to(batch["index"])]).cpu()
    known = torch.searchsorted(first.episode_from, index.contiguous(), right=True) - 1
    wrong = ((known != episode) & (index < first.num_frames)).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise TokenStoreError(
            f"frame {int(index[at])} of the batch lies in episode {int(episode[at])}, and in episode "
            f"{int(known[at])} of the dataset that token store {first.name} was made of. {REMEDY}"
        )
