"""Several stores of one dataset, for different cameras or LAMs, whose tokens are concatenated."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.binding import check_binding
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import TokenStoreError, raise_problems


@dataclass(frozen=True)
class JoinedStores:
    """Stores whose tokens are concatenated in this order; a single store yields its own tokens."""

    stores: tuple[TokenStore, ...]

    @property
    def name(self) -> str:
        return ", ".join(store.name for store in self.stores)

    @property
    def token_dim(self) -> int:
        """Numbers in one frame's token, of all stores."""
        return sum(store.token_dim for store in self.stores)

    def window(self, index: Tensor, deltas: Sequence[int], *, ahead: bool = False) -> Tensor:
        """Tokens of the frames `index + deltas`, float32 `(B, T, token_dim)`; see `TokenStore.window`."""
        return torch.cat([store.window(index, deltas, ahead=ahead) for store in self.stores], dim=-1)


def open_stores(paths: Sequence[str | Path | TokenStore], dataset_meta: Any) -> list[TokenStore]:
    """Open and check each store (or check one that is open already).

    Raises:
        UserError: the first that cannot be used with this dataset.
    """
    for path in paths:
        if isinstance(path, TokenStore):
            check_binding(path, dataset_meta)
    return [path if isinstance(path, TokenStore) else TokenStore.open(path, dataset_meta) for path in paths]


def join_stores(stores: Sequence[TokenStore]) -> TokenStore | JoinedStores:
    """The one store, or several as one.

    Raises:
        TokenStoreError: there is none, or `differences` is not empty.
    """
    if not stores:
        raise TokenStoreError("no token store is named, expected at least one: name a store")
    raise_problems("these token stores cannot be joined", differences(stores), TokenStoreError)
    return stores[0] if len(stores) == 1 else JoinedStores(tuple(stores))


def differences(stores: Sequence[TokenStore]) -> list[str]:
    """Why the tokens of these stores cannot be concatenated; empty if they can."""
    problems = []
    for a, b in itertools.combinations(stores, 2):
        if a.path.resolve() == b.path.resolve():
            problems.append(f"{b.name} is named twice: leave it out once, or name the other camera's store")
        elif None not in (a.provenance, b.provenance) and _view(a) == _view(b):
            camera, fingerprint = _view(a)
            problems.append(
                f"{a.name} and {b.name} hold the same tokens: both are of camera {camera} and the LAM with "
                f"fingerprint {fingerprint[:16]}…. Leave one of them out"
            )
    fields: dict[str, list[Any]] = {
        "frame strides (--frame_stride)": [store.frame_stride for store in stores],
        "kinds of tokens (--use_vq_tokens)": [store.kind for store in stores],
        "compute dtypes (--dtype)": [store.provenance and store.provenance.dtype for store in stores],
    }
    for what, values in fields.items():
        if len({value for value in values if value is not None}) > 1:
            listed = ", ".join(f"{store.name} has {have}" for store, have in zip(stores, values, strict=True))
            problems.append(
                f"they have different {what}: {listed}. Extract with lerobot-lam-precompute what is to be "
                "like the other"
            )
    return problems


def _view(store: TokenStore) -> tuple[str, str]:
    """Which LAM looked at which camera."""
    assert store.provenance is not None
    return store.provenance.camera_key, store.provenance.lam.fingerprint
