"""Partial stores of one dataset as one store, without a LAM."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.episode_hashes import are_known, differing_episodes
from lerobot_lam_diffusion.tokens.layout import refuse_occupied
from lerobot_lam_diffusion.tokens.provenance import Provenance
from lerobot_lam_diffusion.tokens.storage import StoredRows
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.writer import write_store
from lerobot_lam_diffusion.utils.errors import TokenStoreError, UserError, raise_problems


def merge_stores(stores: Sequence[TokenStore], folder: Path) -> TokenStore:
    """Write the episodes of all `stores` into one store; rows are copied as stored.

    Args:
        stores: Made from one dataset by one LAM with the same settings; an episode may be in several.
        folder: Where to create the new store.

    Returns:
        The new store, opened. It is byte-identical to a store extracted in one go if the same versions made
        all of them.

    Raises:
        UserError: no store is given.
        TokenStoreError: the stores differ in what determines a token (every difference is listed), or in the
            tokens of an episode that several of them cover.
        FileExistsError: see `refuse_occupied`.
    """
    if not stores:
        raise UserError("nothing to merge; name the folders of the stores")
    refuse_occupied(folder)
    hashes = _compared(stores)
    source = torch.full_like(stores[0].episode_row, -1)  # which store an episode is taken of
    for number, store in enumerate(stores):
        source[(source < 0) & (store.episode_row >= 0)] = number
    _refuse_contradictions(stores, source)
    first, covered = stores[0], source >= 0
    provenance = _merged(stores, covered)
    rows = (
        StoredRows(_stored(stores[int(source[episode])], episode), provenance.max_error)
        for episode in covered.nonzero().flatten().tolist()
    )
    codebook = torch.empty(0) if first.codebook is None else first.codebook
    return write_store(
        folder, provenance, rows, codebook, first.episode_from, first.episode_to, covered, hashes
    )


def _provenance(store: TokenStore) -> Provenance:
    if store.provenance is None:
        raise TokenStoreError(
            f"{store.path} does not say what its tokens are; only token stores can be merged"
        )
    return store.provenance


def _compared(stores: Sequence[TokenStore]) -> Tensor:
    """Refuse stores that differ in what determines a token.

    Returns:
        Hashes uint8 `(E, 16)` of each episode's frames, as far as any of the stores knows them.
    """
    first, *others = stores
    expected = _provenance(first)
    frames, hashes = expected.dataset.frames, first.episode_hash.clone()
    problems = []
    for other in others:
        provenance = _provenance(other)
        problems += [
            f"{other.path}: {difference} as in {first.path}"
            for difference in provenance.differences(expected)
        ]
        if _bytes_differ(first.codebook, other.codebook):
            problems.append(f"{other.path} has another codebook than {first.path}")
        if _bytes_differ(first.episode_from, other.episode_from):
            problems.append(f"{other.path} has other episode boundaries than {first.path}")
            continue
        other_frames = provenance.dataset.frames
        if (frames and other_frames and frames != other_frames) or differing_episodes(
            hashes, other.episode_hash
        ):
            problems.append(f"{other.path} was made of other frames than the stores before it")
        frames = frames or other_frames
        hashes = torch.where(are_known(hashes).unsqueeze(1), hashes, other.episode_hash)
    raise_problems(
        "the stores cannot be merged; extract them alike with lerobot-lam-precompute",
        problems,
        TokenStoreError,
    )
    return hashes


def _refuse_contradictions(stores: Sequence[TokenStore], source: Tensor) -> None:
    """An episode's tokens are the same in every store that covers it."""
    for number, store in enumerate(stores):
        twice = (store.episode_row >= 0) & (source != number)
        for episode in twice.nonzero().flatten().tolist():
            other = stores[int(source[episode])]
            for name, rows in _stored(store, episode).items():
                if _bytes_differ(rows, _stored(other, episode)[name]):
                    raise TokenStoreError(
                        f"the stores cannot be merged: {other.path} and {store.path} have different tokens "
                        f"of episode {episode}. Find out which is right with lerobot-lam-tokens verify "
                        "--dataset.repo_id=… --lam.path=…, and extract the other one again"
                    )


def _bytes_differ(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is not other
    return one.shape != other.shape or not torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def _stored(store: TokenStore, episode: int) -> dict[str, Tensor]:
    """Stored rows of a covered episode."""
    first = int(store.episode_row[episode])
    rows = slice(first, first + int(store.episode_to[episode] - store.episode_from[episode]))
    tensors = {"tokens" if store.codebook is None else "indices": store.values[rows]}
    return tensors if store.row_scale is None else tensors | {"row_scale": store.row_scale[rows]}


def _merged(stores: Sequence[TokenStore], covered: Tensor) -> Provenance:
    provenances = [_provenance(store) for store in stores]
    skipped = {episode: reason for one in reversed(provenances) for episode, reason in one.skipped.items()}
    versions: dict[str, list[str]] = {}
    for one in provenances:
        for name, version in one.versions.items():
            known = versions.setdefault(name, [])
            known += [version] if version not in known else []
    return replace(
        provenances[0],
        versions={name: ", ".join(known) for name, known in versions.items()},
        max_error=max(one.max_error for one in provenances),
        skipped={
            episode: skipped[episode] for episode in sorted(skipped, key=int) if not covered[int(episode)]
        },
    )
