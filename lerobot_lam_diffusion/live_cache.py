"""`--policy.lam_live_cache`: tokens computed on the fly are kept, so that each pair is encoded once.

    frames of a batch ─► digest of each pair's pixels ─► PairCache ─┬─ known: the kept token
                                                                    └─ else: the LAM, and keep what it says

A kept token counts only for the very pixels that it was made of. So it is what the LAM would say, whatever
stands between the dataset and the policy (augmentation, another decoder, an edited video).
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lerobot_lam_diffusion.constants import AUTO
from lerobot_lam_diffusion.lam import LatentActionModel
from lerobot_lam_diffusion.lam.pixels import pixel_digests
from lerobot_lam_diffusion.lam.villa_x import LamTokens
from lerobot_lam_diffusion.precompute.cache import CacheKey, live_cache_folder
from lerobot_lam_diffusion.precompute.origin import episode_bounds, provenance_of
from lerobot_lam_diffusion.tokens.pair_cache import PairCache
from lerobot_lam_diffusion.tokens.provenance import VQ

logger = logging.getLogger(__name__)

ANY_DECODER = "any"  # pixels are compared themselves


class LiveCache:
    """Tokens of one camera by one LAM, kept between steps, epochs and runs."""

    def __init__(self, pairs: PairCache) -> None:
        self._pairs = pairs
        self._keeps = pairs.is_writable
        self._told_of_other_pixels = False

    @classmethod
    def open(
        cls,
        root: str,
        dataset_meta: Any,
        lam: LatentActionModel,
        *,
        camera_key: str,
        lam_path: str,
        frame_stride: int,
        use_vq_tokens: bool,
        device: str,
    ) -> "LiveCache":
        """Open or make the cache of a dataset's tokens below `root`.

        Args:
            root: A folder, or "auto" for `live_cache_folder()`. What decides a token's value names a folder
                in it, so that runs that differ in it never meet.
            dataset_meta: `LeRobotDatasetMetadata`.
            camera_key: The dataset's name of the camera.
            lam_path: How the user named the LAM.
            device: Kind of device on which the LAM will run.

        Raises:
            TokenStoreError: what is there is damaged.
            OSError: it cannot be made.
        """
        provenance = provenance_of(
            dataset_meta,
            lam,
            camera_key=camera_key,
            lam_path=lam_path,
            frame_stride=frame_stride,
            use_vq_tokens=use_vq_tokens,
        )
        provenance = replace(provenance, device=device)
        origin = provenance.dataset
        key = CacheKey(
            dataset_digest=origin.digest,
            total_frames=origin.total_frames,
            fps=float(origin.fps),
            lam_fingerprint=provenance.lam.fingerprint,
            camera_key=camera_key,
            frame_stride=frame_stride,
            token_kind=provenance.token_kind,
            dtype=provenance.dtype,
            decoder=ANY_DECODER,
            device=device,
        )
        folder = (live_cache_folder() if root == AUTO else Path(root).expanduser()) / key.name
        pairs = PairCache.make(folder, provenance, lam.codebook.cpu(), *episode_bounds(dataset_meta))
        logger.info("LAM tokens: each frame pair is encoded once and kept in %s.", folder)
        if not pairs.is_writable:
            logger.warning(
                "%s may only be read: pairs that are not in it are encoded again each time.", folder
            )
        return cls(pairs)

    def tokens(
        self, prev: Tensor, cur: Tensor, frames: Tensor, encode: Callable[[Tensor, Tensor], LamTokens]
    ) -> Tensor:
        """Tokens float32 `(P, n·a)` of frame pairs, kept or else computed.

        Args:
            prev, cur: uint8 `(P, 3, H, W)`.
            frames: Absolute indices of the later frames, int64 `(P,)`.
            encode: Asks the LAM.
        """
        pixels = pixel_digests(prev, cur).cpu()
        frames = frames.cpu()
        found = self._pairs.read(frames, pixels)
        values = found.values
        missing = (~found.known).nonzero().flatten()
        if len(missing):
            rows = missing.to(prev.device)
            computed = encode(prev[rows], cur[rows])
            of_kind = computed.indices if self._pairs.provenance.token_kind == VQ else computed.continuous
            values[missing] = of_kind.cpu().to(values.dtype)
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
        return self._pairs.decode(values).to(prev.device)

    def _keep(self, frames: Tensor, pixels: Tensor, values: Tensor) -> None:
        if not self._keeps:
            return
        try:
            self._pairs.write(frames, pixels, values)
        except OSError as error:
            self._keeps = False  # training needs no cache
            logger.warning("Tokens are no longer kept in %s: %s.", self._pairs.path, error)
