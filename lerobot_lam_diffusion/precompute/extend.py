"""Extend: reuse an older store's tokens for the provably unchanged episodes of a grown dataset."""

from collections.abc import Sequence

from torch import Tensor

from lerobot_lam_diffusion.precompute.shards import Plan
from lerobot_lam_diffusion.tokens.episode_hashes import are_known
from lerobot_lam_diffusion.tokens.provenance import OF_THE_DATASET, VQ, Provenance
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import ExtractionError, raise_problems


def known_episodes(stores: Sequence[TokenStore], plan: Plan) -> dict[int, Tensor]:
    """Map the position in the plan of each episode whose tokens are known to the stored values of its frames.

    Args:
        stores: Stores of other versions of the dataset.

    Raises:
        ExtractionError: a store's tokens were made in another way, or it has no hashes of its frames.
    """
    places: dict[bytes, tuple[TokenStore, int]] = {}
    for store in stores:
        _refuse_unlike(store, plan.provenance)
        known = are_known(store.episode_hash) & (store.episode_row >= 0)
        for episode in known.nonzero().flatten().tolist():
            places[_key(store.episode_hash, episode)] = (store, int(store.episode_row[episode]))
    values = {}
    for position, episode in enumerate(plan.episodes if places else ()):
        place = places.get(_key(plan.episode_hash, episode))
        if place is not None:
            store, first = place
            values[position] = store.values[first : first + plan.lengths[position]]
    return values


def _key(hashes: Tensor, episode: int) -> bytes:
    return bytes(hashes[episode].tolist())


def _refuse_unlike(store: TokenStore, provenance: Provenance) -> None:
    if store.provenance is None:
        raise ExtractionError(
            f"--extend={store.name}: a .pt file does not say how its tokens were made; name a token store"
        )
    problems = store.provenance.differences(provenance, ignore=OF_THE_DATASET)
    if provenance.token_kind != VQ and provenance.storage_dtype != "float32":
        problems.append(
            f"tokens stored as {provenance.storage_dtype} are rounded, and would be rounded twice; extract "
            "all of them again, without --extend"
        )
    if not are_known(store.episode_hash).any():
        problems.append("it was made before stores knew each episode's frames; extract it again")
    raise_problems(
        f"--extend={store.name} cannot be extended: its tokens are not those that this run makes",
        problems,
        ExtractionError,
    )
