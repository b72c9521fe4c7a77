"""Extend: an older store's tokens for those episodes of a grown dataset that are provably the same."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lerobot_lam_diffusion.precompute.plan import Plan, differences, identity_of
from lerobot_lam_diffusion.problems import ExtractionError, raise_problems
from lerobot_lam_diffusion.tokens.episode_hashes import are_known
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.store import TokenStore

OF_THE_DATASET = ("dataset.total_frames", "dataset.total_episodes", "dataset.digest")
"""In these a dataset may differ from an earlier version of itself."""


class KnownEpisodes:
    """Tokens of episodes by the hash of their frames.

    Args:
        stores: Of other versions of the dataset.
        provenance: Of the store to be made.

    Raises:
        ExtractionError: a store was made in another way, so that its tokens are others, or it does not know
            its frames.
    """

    def __init__(self, stores: Sequence[TokenStore], provenance: Provenance) -> None:
        self._places: dict[bytes, tuple[TokenStore, int]] = {}
        for store in stores:
            _refuse_unlike(store, provenance)
            known = (are_known(store.episode_hash) & (store.episode_row >= 0)).nonzero().flatten().tolist()
            for episode in known:
                self._places[bytes(store.episode_hash[episode].tolist())] = (store, episode)

    def positions(self, positions: Iterable[int], plan: Plan, hashes: Tensor) -> dict[int, Tensor]:
        """Those of the plan's `positions` whose tokens are known → the stored values of their frames.

        Args:
            hashes: Of the dataset's episodes, uint8 `(E, 16)`.
        """
        found = {}
        for position in positions if self._places else ():
            place = self._places.get(bytes(hashes[plan.episodes[position]].tolist()))
            if place is not None:
                store, episode = place
                first, length = int(store.episode_row[episode]), plan.lengths[position]
                found[position] = store.values[first : first + length]
        return found


def _refuse_unlike(store: TokenStore, provenance: Provenance) -> None:
    if store.provenance is None:
        raise ExtractionError(
            f"--extend={store.name}: a .pt file does not say how its tokens were made; name a token store"
        )
    there, here = (_way(each) for each in (store.provenance, provenance))
    problems = differences(here, there)
    if provenance.token_kind != VQ and provenance.storage_dtype != "float32":
        problems.append(
            f"tokens kept as {provenance.storage_dtype} are rounded, and would be rounded twice; extract all "
            "of them again, without --extend"
        )
    if not are_known(store.episode_hash).any():
        problems.append("it was made before stores knew each episode's frames; extract it again")
    raise_problems(
        f"--extend={store.name} cannot be extended: its tokens are not those that this run makes",
        problems,
        ExtractionError,
    )


def _way(provenance: Provenance) -> dict[str, Any]:
    return {name: value for name, value in identity_of(provenance).items() if name not in OF_THE_DATASET}
