"""`LamTokenDataset`: a LeRobot dataset whose items bring their LAM tokens, for one's own training loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from lerobot_lam_diffusion.constants import OBS_LAM_TOKENS
from lerobot_lam_diffusion.tokens.joined import JoinedStores, join_stores, open_stores
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import DatasetError, TrainingError


class LamTokenDataset(Dataset):
    """Map-style wrapper that adds `observation.lam_tokens` to each item and changes nothing else.

    Args:
        dataset: A `LeRobotDataset`.
        path: Token store made from that dataset (or the opened store); checked here, before any item is
            read. If a list of stores, their tokens are concatenated.
        deltas: Frame offsets of the tokens, oldest first; for a policy, its `config.lam_token_deltas`. `[0]`:
            the frame's own token. If any offset is above 0, frames past the episode's end get zeros.
        key: Item key of the tokens.

    An item's tokens are float32 `(len(deltas), token_dim)`.

    Raises:
        TokenStoreError: no store there, damaged, or of another dataset; or stores that cannot be joined.
    """

    def __init__(
        self,
        dataset: Any,
        path: str | Path | TokenStore | JoinedStores | Sequence[str | Path | TokenStore],
        deltas: Sequence[int] = (0,),
        key: str = OBS_LAM_TOKENS,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise TrainingError(
                "LamTokenDataset wraps map-style datasets; a streamed one needs no wrapper: build the policy "
                "by LeRobot's make_policy with --policy.lam_tokens_path, which joins the tokens in forward()"
            )
        if not hasattr(dataset, "meta"):
            raise DatasetError(
                f"LamTokenDataset wraps a LeRobotDataset, not a {type(dataset).__name__}, whose frames may "
                "be of several datasets: wrap each dataset with its own store, then concatenate them"
            )
        if key in dataset.meta.features:
            raise DatasetError(
                f"the dataset has a column {key!r} already: train on that column, or drop it with "
                "lerobot-edit-dataset before joining a token store"
            )
        self.dataset = dataset
        path = path.stores if isinstance(path, JoinedStores) else path
        paths = [path] if isinstance(path, str | Path | TokenStore) else path
        self.store = join_stores(open_stores(paths, dataset.meta))
        self.deltas = tuple(deltas)
        self.key = key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        item = self.dataset[position]
        index = torch.as_tensor(item["index"]).reshape(1)
        return {**item, self.key: self.store.window(index, self.deltas, ahead=max(self.deltas) > 0)[0]}

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while unpickling, before the instance has its fields
            raise AttributeError(name)
        return getattr(self.dataset, name)
