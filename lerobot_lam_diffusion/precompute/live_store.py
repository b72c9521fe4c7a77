"""A live cache → a token store: tokens of exactly the dataset's pixels; a LAM makes the missing ones."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lerobot_lam_diffusion.lam.pixels import pixel_digests
from lerobot_lam_diffusion.precompute.dataset import decoder_version
from lerobot_lam_diffusion.precompute.frames import EpisodeFrames, backend_of, decoder_of
from lerobot_lam_diffusion.precompute.pairs import episode_pairs
from lerobot_lam_diffusion.precompute.recompute import refuse_other_tokens
from lerobot_lam_diffusion.tokens.binding import check_binding
from lerobot_lam_diffusion.tokens.episode_hashes import episode_hashes
from lerobot_lam_diffusion.tokens.provenance import VQ
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.writer import write_store
from lerobot_lam_diffusion.utils.errors import TokenStoreError
from lerobot_lam_diffusion.utils.files import refuse_existing

if TYPE_CHECKING:
    from pathlib import Path

    from lerobot_lam_diffusion.tokens.pairs import PairCache


class LiveStore(NamedTuple):
    """What `store_of_live_cache` made.

    Attributes:
        store: The new store.
        incomplete: Episodes left out because the cache lacks some of their pairs.
        other_pixels: Complete episodes left out because a kept token is not of the dataset's pixels.
        encoded: Pairs that the LAM encoded.
    """

    store: TokenStore
    incomplete: int
    other_pixels: int
    encoded: int


def store_of_live_cache(
    cache: "PairCache", dataset: Any, folder: "Path", lam: Any = None, show_progress: bool = True
) -> LiveStore:
    """Write the complete episodes as a token store, or, given a LAM, all episodes.

    Frames are decoded again: a kept token goes into the store only if it was made from the dataset's pixels
    (training may have augmented them). Tokens are held in memory until they are written: 4·n bytes per frame,
    or 4·n·a if continuous.

    Args:
        dataset: `LeRobotDataset`, the one that was trained on.
        folder: Folder of the future store.
        lam: The cache's LAM (see `load_lam`), to encode pairs whose token is missing or of other pixels.

    Raises:
        TokenStoreError: it is another dataset or LAM, or there is neither a LAM nor a complete episode.
        DecodeError: an episode cannot be read.
        FileExistsError: see `writer.refuse_existing`.
    """
    refuse_existing(folder)
    tables, camera = cache.tables, cache.provenance.camera_key
    check_binding(tables, dataset.meta)
    if lam is not None:
        refuse_other_tokens(tables, lam)
    known = torch.zeros(tables.num_frames, dtype=torch.bool)
    for frames, _, _ in cache.scan():
        known[frames] = True
    reader = EpisodeFrames(dataset, camera)
    blocks: dict[int, Tensor] = {}
    other_pixels = incomplete = encoded = 0
    opened = range(len(tables.episode_from)) if dataset.episodes is None else sorted(set(dataset.episodes))
    for episode in tqdm(opened, unit="episode", desc="Kept tokens", disable=not show_progress):
        first, end = int(tables.episode_from[episode]), int(tables.episode_to[episode])
        if lam is None and not known[min(first + tables.frame_stride, end) : end].all():
            incomplete += 1
            continue
        values, missing = _values_of(cache, reader, lam, episode, first, end)
        if missing and lam is None:
            other_pixels += 1
        else:
            blocks[episode] = values
            encoded += missing
    if not any(len(values) > tables.frame_stride for values in blocks.values()):
        reasons = [f"{int(known.sum()):,} of {cache.num_pairs:,} pairs are kept"]
        if other_pixels:
            reasons.append(
                f"{other_pixels} episodes have tokens of other pixels (augmentation, or another "
                "--dataset.video_backend than in training)"
            )
        raise TokenStoreError(
            f"{cache.path} holds no complete episode of this dataset: {', '.join(reasons)}. Training never "
            "visits the last --policy.drop_n_last_frames frames of an episode. Pass the LAM, "
            f"--lam.path={cache.provenance.lam.path}, and merge encodes what is missing"
        )
    covered = torch.zeros(len(tables.episode_from), dtype=torch.bool)
    covered[list(blocks)] = True
    decoder, provenance = decoder_of(dataset.meta, camera, backend_of(dataset)), cache.provenance
    store = write_store(
        folder,
        replace(provenance, decoder=decoder, versions=provenance.versions | decoder_version(decoder)),
        blocks.values(),
        torch.empty(0) if tables.codebook is None else tables.codebook,
        tables.episode_from,
        tables.episode_to,
        covered,
        episode_hashes(dataset.meta, camera),
    )
    return LiveStore(store, incomplete, other_pixels, encoded)


def _values_of(
    cache: "PairCache", reader: EpisodeFrames, lam: Any, episode: int, first: int, end: int
) -> tuple[Tensor, int]:
    """An episode's values, zeros where it has no token; and how many pairs lacked a token of their pixels."""
    values, missing = cache.no_values(end - first), 0
    for batch in episode_pairs(reader.chunks(episode), first, cache.tables.frame_stride):
        found = cache.read(batch.rows, pixel_digests(batch.prev, batch.cur))
        unknown = ~found.known
        missing += int(unknown.sum())
        if lam is not None and unknown.any():
            tokens = lam.encode_pairs(batch.prev[unknown], batch.cur[unknown])
            computed = tokens.stored(cache.provenance.token_kind == VQ)
            found.values[unknown] = computed.cpu().to(found.values.dtype)
        values[batch.rows - first] = found.values
    return values, missing
