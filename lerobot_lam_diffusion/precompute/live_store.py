"""A live cache → a token store: tokens of exactly the dataset's pixels; the LAM makes the missing ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lerobot_lam_diffusion.lam.pixels import pixel_digests
from lerobot_lam_diffusion.precompute.dataset import decoder_version
from lerobot_lam_diffusion.precompute.frames import EpisodeFrames, backend_of, decoder_of
from lerobot_lam_diffusion.precompute.pairs import episode_pairs
from lerobot_lam_diffusion.tokens.binding import check_binding
from lerobot_lam_diffusion.tokens.episode_hashes import episode_hashes
from lerobot_lam_diffusion.tokens.pairs import PairCache
from lerobot_lam_diffusion.tokens.provenance import VQ, refuse_other_lam
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.writer import write_store
from lerobot_lam_diffusion.utils.files import refuse_existing


def store_of_live_cache(
    cache: PairCache, dataset: Any, folder: Path, lam: Any, show_progress: bool = True
) -> tuple[TokenStore, int]:
    """Write a token store of the episodes that the dataset was opened with.

    Frames are decoded again: a kept token goes into the store only if it was made from the dataset's pixels
    (training may have augmented them), and the LAM encodes the other pairs. Tokens are held in memory until
    they are written: 4·n bytes per frame, or 4·n·a if continuous.

    Args:
        dataset: `LeRobotDataset`, the one that was trained on.
        folder: Folder of the future store.
        lam: The cache's LAM (see `load_lam`).

    Returns:
        The store, and how many pairs the LAM encoded.

    Raises:
        TokenStoreError: it is another dataset or LAM.
        DecodeError: an episode cannot be read.
        FileExistsError: see `writer.refuse_existing`.
    """
    refuse_existing(folder)
    tables, camera = cache.tables, cache.provenance.camera_key
    check_binding(tables, dataset.meta)
    refuse_other_lam(str(cache.path), cache.provenance.lam, lam)
    reader = EpisodeFrames(dataset, camera)
    opened = range(len(tables.episode_from)) if dataset.episodes is None else sorted(set(dataset.episodes))
    blocks: list[Tensor] = []
    encoded = 0
    for episode in tqdm(opened, unit="episode", desc="Kept tokens", disable=not show_progress):
        first, end = int(tables.episode_from[episode]), int(tables.episode_to[episode])
        values = cache.no_values(end - first)
        for batch in episode_pairs(reader.chunks(episode), first, tables.frame_stride):
            found = cache.read(batch.rows, pixel_digests(batch.prev, batch.cur))
            unknown = ~found.known
            if unknown.any():
                tokens = lam.encode_pairs(batch.prev[unknown], batch.cur[unknown])
                computed = tokens.stored(cache.provenance.token_kind == VQ)
                found.values[unknown] = computed.cpu().to(found.values.dtype)
                encoded += int(unknown.sum())
            values[batch.rows - first] = found.values
        blocks.append(values)
    covered = torch.zeros(len(tables.episode_from), dtype=torch.bool)
    covered[list(opened)] = True
    decoder, provenance = decoder_of(dataset.meta, camera, backend_of(dataset)), cache.provenance
    store = write_store(
        folder,
        replace(provenance, decoder=decoder, versions=provenance.versions | decoder_version(decoder)),
        blocks,
        torch.empty(0) if tables.codebook is None else tables.codebook,
        tables.episode_from,
        tables.episode_to,
        covered,
        episode_hashes(dataset.meta, camera),
    )
    return store, encoded
