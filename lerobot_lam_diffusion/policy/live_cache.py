"""`--policy.lam_live_cache`: tokens computed on the fly are cached, so that each pair is encoded once.

    frames of a batch ─► digest of each pair's pixels ─► PairCache ─┬─ known: the cached token
                                                                    └─ else: the LAM, whose token is cached

A cached token is used only for the exact pixels that it was computed from. It is therefore what the LAM would
return, whatever happens to the pixels before the policy (augmentation, another decoder, an edited video).
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
from lerobot_lam_diffusion.policy.cameras import dataset_camera
from lerobot_lam_diffusion.precompute.cache import cache_name, live_cache_folder
from lerobot_lam_diffusion.precompute.dataset import (
    codebook_of,
    dataset_info,
    describe_tokens,
)
from lerobot_lam_diffusion.tokens.dataset_check import episode_bounds
from lerobot_lam_diffusion.tokens.pairs import PairCache
from lerobot_lam_diffusion.tokens.provenance import VQ
from lerobot_lam_diffusion.utils.errors import TokenStoreError

logger = logging.getLogger(__name__)

ANY_DECODER = "any"  # pixels are compared themselves


def open_live_caches(
    config: DiffusionLamConfig,
    dataset_meta: Any,
    lams: Sequence[LatentActionModel],
    names: Mapping[str, str] | None = None,
) -> "list[LiveCache]":
    """Open or create, for each source, the cache of a training dataset's tokens.

    All that determines a token's value enters the folder name, so runs that differ in it never share a cache.

    Args:
        config: With `lam_live_cache`, "auto" or a folder.
        dataset_meta: `LeRobotDatasetMetadata`.
        lams: The LAM of each source.
        names: The policy's names of cameras → the dataset's, as far as they are known.

    Raises:
        UserError: a camera is not known in the dataset, or a cache is damaged or cannot be created.
    """
    sources = config.token_sources
    cameras = [dataset_camera(config, str(source.camera_key), dataset_meta, names) for source in sources]
    root = live_cache_folder() if config.lam_live_cache == AUTO else Path(str(config.lam_live_cache))
    caches = []
    for source, camera, lam in zip(sources, cameras, lams, strict=True):
        provenance = describe_tokens(
            dataset_info(dataset_meta, camera),
            lam,
            camera_key=camera,
            lam_path=str(source.model_path),
            frame_stride=config.lam_frame_stride or 1,
            use_vq_tokens=config.lam_use_vq_tokens,
        )
        provenance = replace(provenance, device=torch.device(str(config.device)).type)
        folder = root.expanduser() / cache_name(replace(provenance, decoder=ANY_DECODER))
        try:
            pairs = PairCache.make(folder, provenance, codebook_of(lam), *episode_bounds(dataset_meta))
        except OSError as error:
            raise TokenStoreError(
                f"--policy.lam_live_cache={config.lam_live_cache} cannot be used: {folder} cannot be made or "
                f"opened ({error}). Name another folder, or leave the flag out"
            ) from error
        caches.append(LiveCache(pairs))
        logger.info(
            "LAM tokens: each frame pair of %s is %s %s.",
            camera, "encoded once and cached in" if pairs.is_writable else "taken, where known, from",
            folder,
        )  # fmt: skip
    return caches


class LiveCache:
    """Tokens of one camera by one LAM, cached between steps, epochs and runs."""

    def __init__(self, pairs: PairCache) -> None:
        self._pairs = pairs
        self._use_vq_tokens = pairs.provenance.token_kind == VQ
        self._reads = True
        self._writes = pairs.is_writable
        self._warned_of_pixels = False

    def disable(self, why: str) -> None:
        """Stop reading and writing, and warn once."""
        if self._reads:
            self._reads = False
            logger.warning("Tokens are computed each time, without %s: %s.", self._pairs.path, why)

    @torch.compiler.disable  # files are no part of a graph
    def tokens(
        self, prev: Tensor, cur: Tensor, frames: Tensor, encode: Callable[[Tensor, Tensor], LamTokens]
    ) -> Tensor:
        """Tokens float32 `(P, n·a)` of frame pairs, cached or else computed.

        Args:
            prev, cur: uint8 `(P, 3, H, W)`.
            frames: Absolute indices of the later frames, int64 `(P,)`.
            encode: Calls the LAM.
        """
        cache, kind = self._pairs, self._use_vq_tokens
        if prev.device.type != cache.provenance.device:
            self.disable(
                f"the LAM runs on {prev.device.type}, and --policy.device says {cache.provenance.device}"
            )
        if self._reads:
            pixels, frames = pixel_digests(prev, cur), frames.cpu()
            try:
                found = cache.read(frames, pixels)
            except OSError as error:  # training needs no cache
                self.disable(str(error))
        if not self._reads:
            return encode(prev, cur).of_kind(kind)
        values = found.values
        missing = (~found.known).nonzero().flatten()
        if len(missing):
            rows = missing.to(prev.device)
            computed = encode(prev[rows], cur[rows]).stored(kind)
            values[missing] = computed.cpu().to(values.dtype)
            self._write(frames[missing], pixels[missing], values[missing])
        if found.other_pixels.any() and not self._warned_of_pixels:
            self._warned_of_pixels = True
            logger.warning(
                "The pixels of frame %d and its predecessor are not those that their cached token was "
                "computed from: such pairs are encoded again. Each pair differs each time where "
                "--dataset.image_transforms changes images, and lam_live_cache saves nothing then; once only "
                "after a change of video decoder.",
                int(frames[found.other_pixels][0]),
            )
        return cache.decode(values).to(prev.device)

    def _write(self, frames: Tensor, pixels: Tensor, values: Tensor) -> None:
        if not self._writes:
            return
        try:
            self._pairs.write(frames, pixels, values)
        except OSError as error:
            self._writes = False  # training needs no cache
            logger.warning("Tokens are no longer cached in %s: %s.", self._pairs.path, error)
