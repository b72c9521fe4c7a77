"""`--policy.lam_live_cache`: tokens computed on the fly are kept, so that each pair is encoded once.

    frames of a batch ─► digest of each pair's pixels ─► PairCache ─┬─ known: the kept token
                                                                    └─ else: the LAM, and keep what it says

A kept token counts only for the very pixels that it was made of. So it is what the LAM would say, whatever
stands between the dataset and the policy (augmentation, another decoder, an edited video).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.constants import AUTO
from lerobot_lam_diffusion.lam import LamTokens, LatentActionModel
from lerobot_lam_diffusion.lam.pixels import pixel_digests
from lerobot_lam_diffusion.precompute.cache import CacheKey, live_cache_folder
from lerobot_lam_diffusion.precompute.origin import codebook_of, episode_bounds, provenance_of
from lerobot_lam_diffusion.token_source import dataset_camera
from lerobot_lam_diffusion.tokens.pair_cache import LiveCacheError, PairCache
from lerobot_lam_diffusion.tokens.provenance import VQ

logger = logging.getLogger(__name__)

ANY_DECODER = "any"  # pixels are compared themselves


def open_live_caches(
    config: DiffusionLamConfig,
    dataset_meta: Any,
    lams: Sequence[LatentActionModel],
    names: Mapping[str, str] | None = None,
) -> "list[LiveCache]":
    """Open or make the cache of each source's tokens of a training dataset.

    What decides a token's value names a cache's folder, so that runs that differ in it never meet.

    Args:
        config: With `lam_live_cache`, "auto" or a folder.
        dataset_meta: `LeRobotDatasetMetadata`.
        lams: The LAM of each source.
        names: The policy's names of cameras → the dataset's, as far as they are known.

    Raises:
        UserError: a camera is not known in the dataset, or a cache is damaged or cannot be made.
    """
    cameras = [
        dataset_camera(config, str(source.camera_key), dataset_meta, names) for source in config.token_sources
    ]
    root = live_cache_folder() if config.lam_live_cache == AUTO else Path(str(config.lam_live_cache))
    caches = []
    for source, camera, lam in zip(config.token_sources, cameras, lams, strict=True):
        provenance = provenance_of(
            dataset_meta,
            lam,
            camera_key=camera,
            lam_path=str(source.model_path),
            frame_stride=config.lam_frame_stride or 1,
            use_vq_tokens=config.lam_use_vq_tokens,
        )
        provenance = replace(provenance, device=torch.device(str(config.device)).type)
        folder = root.expanduser() / CacheKey.of(provenance, decoder=ANY_DECODER).name
        try:
            pairs = PairCache.make(folder, provenance, codebook_of(lam), *episode_bounds(dataset_meta))
        except OSError as error:
            raise LiveCacheError(
                f"--policy.lam_live_cache={config.lam_live_cache} cannot be used: {folder} cannot be made or "
                f"opened ({error}). Name another folder, or leave the flag out"
            ) from error
        caches.append(LiveCache(pairs))
        told = "encoded once and kept" if pairs.is_writable else "taken, where it is known,"
        logger.info(
            "LAM tokens: each frame pair of %s is %s in %s (%d of %d are there).",
            camera, told, folder, pairs.num_kept(), pairs.num_pairs,
        )  # fmt: skip
    return caches


class LiveCache:
    """Tokens of one camera by one LAM, kept between steps, epochs and runs."""

    def __init__(self, pairs: PairCache) -> None:
        self._pairs = pairs
        self._is_used = True
        self._keeps = pairs.is_writable
        self._told_of_other_pixels = False

    def miss(self, why: str) -> None:
        """Tell, once, that tokens are neither taken from here nor kept."""
        if self._is_used:
            self._is_used = False
            logger.warning("Tokens are computed each time, without %s: %s.", self._pairs.path, why)

    @torch.compiler.disable  # files are no part of a graph
    def tokens(
        self, prev: Tensor, cur: Tensor, frames: Tensor, encode: Callable[[Tensor, Tensor], LamTokens]
    ) -> Tensor:
        """Tokens float32 `(P, n·a)` of frame pairs, kept or else computed.

        Args:
            prev, cur: uint8 `(P, 3, H, W)`.
            frames: Absolute indices of the later frames, int64 `(P,)`.
            encode: Asks the LAM.
        """
        pairs = self._pairs
        device = pairs.provenance.device
        if prev.device.type != device:
            self.miss(f"the LAM runs on {prev.device.type}, and --policy.device says {device}")
        if self._is_used:
            pixels, frames = pixel_digests(prev, cur).cpu(), frames.cpu()
            try:
                found = pairs.read(frames, pixels)
            except OSError as error:  # training needs no cache
                self.miss(str(error))
        if not self._is_used:
            return self._of_kind(encode(prev, cur), decoded=True)
        values = found.values
        missing = (~found.known).nonzero().flatten()
        if len(missing):
            rows = missing.to(prev.device)
            computed = self._of_kind(encode(prev[rows], cur[rows]))
            values[missing] = computed.cpu().to(values.dtype)
            self._keep(frames[missing], pixels[missing], values[missing])
        if found.other_pixels.any() and not self._told_of_other_pixels:
            self._told_of_other_pixels = True
            logger.warning(
                "The pixels of frame %d and its predecessor are not those that their kept token was made of: "
                "such pairs are encoded again. Each pair differs each time where --dataset.image_transforms "
                "changes pictures, and lam_live_cache saves nothing then; once only after a change of video "
                "decoder.",
                int(frames[found.other_pixels][0]),
            )
        return pairs.decode(values).to(prev.device)

    def _of_kind(self, tokens: LamTokens, decoded: bool = False) -> Tensor:
        """What is kept of tokens; `decoded`: the tokens themselves."""
        use_vq_tokens = self._pairs.provenance.token_kind == VQ
        return tokens.of_kind(use_vq_tokens) if decoded else tokens.stored(use_vq_tokens)

    def _keep(self, frames: Tensor, pixels: Tensor, values: Tensor) -> None:
        if not self._keeps:
            return
        try:
            self._pairs.write(frames, pixels, values)
        except OSError as error:
            self._keeps = False  # training needs no cache
            logger.warning("Tokens are no longer kept in %s: %s.", self._pairs.path, error)
