"""Partial stores of one dataset as one store, without a LAM."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.episode_hashes import are_known, differing_episodes
from lerobot_lam_diffusion.tokens.layout import refuse_occupied
from lerobot_lam_diffusion.tokens.provenance import Provenance
from lerobot_lam_diffusion.tokens.storage import StoredRows
from lerobot_lam_diffusion.tokens.store import BLOCK_ROWS, TokenStore
from lerobot_lam_diffusion.tokens.writer import write_rows
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
    _refuse_different(stores)
    source = torch.full_like(stores[0].episode_row, -1)  # which store an episode is taken of
    for number, store in enumerate(stores):
        source[(source < 0) & (store.episode_row >= 0)] = number
    _refuse_contradictions(stores, source)
    first = stores[0]
    codebook = torch.empty(0) if first.codebook is None else first.codebook
    covered = source >= 0
    provenance = _merged(stores, covered)
    return write_rows(
        folder,
        provenance,
        _rows(stores, source),
        codebook,
        first.episode_from,
        first.episode_to,
        covered,
        _hashes(stores),
    )


def _provenance(store: TokenStore) -> Provenance:
    if store.provenance is None:
        raise TokenStoreError(
            f"{store.path} does not say what its tokens are; only token stores can be merged"
        )
    return store.provenance


def _refuse_different(stores: Sequence[TokenStore]) -> None:
    first, *others = stores
    expected = _provenance(first)
    problems = []
    for number, other in enumerate(others, 1):
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
        # Compare with all previous stores: one may know frames that the first does not.
        unlike = next((store for store in stores[:number] if _have_other_frames(store, other)), None)
        if unlike is not None:
            problems.append(f"{other.path} was made of other frames than {unlike.path}")
    raise_problems(
        "the stores cannot be merged; extract them alike with lerobot-lam-precompute",
        problems,
        TokenStoreError,
    )


def _have_other_frames(one: TokenStore, other: TokenStore) -> bool:
    digests = {_provenance(store).dataset.frames for store in (one, other)} - {""}
    return len(digests) > 1 or bool(differing_episodes(one.episode_hash, other.episode_hash))


def _refuse_contradictions(stores: Sequence[TokenStore], source: Tensor) -> None:
    """An episode's tokens are the same in every store that covers it."""
    for number, store in enumerate(stores):
        twice = (store.episode_row >= 0) & (source != number)
        for episode in twice.nonzero().flatten().tolist():
            other = stores[int(source[episode])]
            for name, rows in _stored(store, episode, episode + 1).items():
                if _bytes_differ(rows, _stored(other, episode, episode + 1)[name]):
                    raise TokenStoreError(
                        f"the stores cannot be merged: {other.path} and {store.path} have different tokens "
                        f"of episode {episode}. Find out which is right with lerobot-lam-tokens verify "
                        "--dataset.repo_id=… --lam.path=…, and extract the other one again"
                    )


def _hashes(stores: Sequence[TokenStore]) -> Tensor:
    """Of each episode's frames, as far as any of the stores knows them."""
    hashes = stores[0].episode_hash.clone()
    for store in stores[1:]:
        unknown = ~are_known(hashes)
        hashes[unknown] = store.episode_hash[unknown]
    return hashes


def _bytes_differ(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is not other
    return one.shape != other.shape or not torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def _rows(stores: Sequence[TokenStore], source: Tensor) -> Iterator[StoredRows]:
    """Rows of all covered episodes in order; neighbours of one store together."""
    changes = (source.diff() != 0).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), len(source)]
    for start, stop in pairwise(bounds):
        if source[start] < 0:
            continue
        tensors = _stored(stores[int(source[start])], start, stop)
        for row in range(0, len(next(iter(tensors.values()))), BLOCK_ROWS):
            yield StoredRows({name: rows[row : row + BLOCK_ROWS] for name, rows in tensors.items()})


def _stored(store: TokenStore, start: int, stop: int) -> dict[str, Tensor]:
    """Stored rows of the covered episodes `start .. stop - 1`, which are contiguous in the store."""
    first = int(store.episode_row[start])
    end = first + int(store.episode_to[stop - 1] - store.episode_from[start])
    name = "tokens" if store.codebook is None else "indices"
    tensors = {name: store.values[first:end]}
    return tensors if store.row_scale is None else tensors | {"row_scale": store.row_scale[first:end]}


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
