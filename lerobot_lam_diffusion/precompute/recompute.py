"""Check a store against the LAM itself: encode a random sample of its frame pairs again."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.lam.pixels import pixel_digests
from lerobot_lam_diffusion.lam.preprocess import as_uint8
from lerobot_lam_diffusion.precompute.frames import DecodeError, choose_camera
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.pairs import PairCache
from lerobot_lam_diffusion.tokens.provenance import VQ, refuse_other_lam
from lerobot_lam_diffusion.utils.errors import first_line


@dataclass(frozen=True)
class Agreement:
    """How a sample of stored tokens compares with the LAM's.

    Attributes:
        checked: Tokens compared.
        equal: How many are equal: VQ bit for bit, continuous within `TOLERANCE` plus the storage error.
        max_error: Largest absolute difference of any number.
        distinct: Number of distinct tokens among them: agreement on a single value would prove little.
        mean_error: Mean absolute difference of the numbers.
        mean_error_of_others: The same, between each stored token and the LAM's token of another frame.
    """

    checked: int
    equal: int
    max_error: float
    distinct: int
    mean_error: float
    mean_error_of_others: float

    @property
    def text(self) -> str:
        return (
            f"{self.equal} of {self.checked} sampled tokens agree with the LAM ({self.distinct} different "
            f"ones, largest difference {self.max_error:.2g})"
        )


TOLERANCE = 1e-3
"""For continuous tokens, relative to their largest absolute value: rounding differs between batch shapes and
machines (by 1e-6 to 5e-5 for a float32 encoder), whereas other frames give entirely different tokens."""


def recompute_sample(
    store: TokenStore,
    dataset: Any,
    lam: Any,
    num_samples: int,
    seed: int = 0,
    camera_key: str | None = None,
) -> Agreement:
    """Encode `num_samples` random pairs of `dataset` again and compare.

    Frames are read by LeRobot's own random access, not by the extraction's decoder.

    Args:
        camera_key: Which camera the LAM looked at, where the store is a `.pt` file, which does not tell.

    Raises:
        TokenStoreError: the store was made by another LAM, or holds no tokens to compare.
        UserError: it is not known which camera to look at, or a frame cannot be read.
    """
    refuse_other_tokens(store, lam)
    camera = _camera(store, dataset, camera_key)
    index = _sample(store.frames_with_tokens(), store, dataset, num_samples, seed)
    if not len(index):
        raise TokenStoreError(
            f"{store.path} holds no tokens of these episodes, shorter than its stride or not covered"
        )
    prev, cur = (
        _frames(dataset, camera, frames, lam.device) for frames in (index - store.frame_stride, index)
    )
    stored_error = store.provenance.max_error if store.provenance is not None else 0.0
    return _agreement(store.window(index, [0])[:, 0], store.kind, lam.encode_pairs(prev, cur), stored_error)


def recompute_kept(
    cache: PairCache, dataset: Any, lam: Any, num_samples: int, seed: int = 0
) -> tuple[Agreement, int]:
    """As `recompute_sample`, for a live cache; also count sampled tokens of other pixels than the dataset's.

    Raises:
        TokenStoreError: the tokens were made by another LAM, or none was made from the dataset's pixels.
    """
    refuse_other_lam(str(cache.path), cache.provenance.lam, lam)
    kept = torch.cat([frames for frames, _, _ in cache.scan()])
    index = _sample(kept, cache.tables, dataset, num_samples, seed)
    if not len(index):
        raise TokenStoreError(f"{cache.path} holds no tokens to compare yet: train on with it first")
    prev, cur = (
        _frames(dataset, cache.provenance.camera_key, frames, lam.device)
        for frames in (index - cache.tables.frame_stride, index)
    )
    found = cache.read(index, pixel_digests(prev, cur))
    same = found.known
    if not same.any():
        raise TokenStoreError(
            f"none of {len(index)} sampled tokens in {cache.path} was made of the dataset's pixels: trained "
            "with --dataset.image_transforms, or another video decoder? Such a cache saves nothing; remove it"
        )
    tokens = lam.encode_pairs(prev[same], cur[same])
    stored = cache.decode(found.values[same])
    return _agreement(stored, cache.provenance.token_kind, tokens), int((~same).sum())


def _frames(dataset: Any, camera: str, index: Tensor, device: torch.device) -> Tensor:
    """Frames of absolute indices by LeRobot's own random access, uint8 `(B, 3, H, W)`."""
    relative = dataset.absolute_to_relative_idx
    frames = []
    for i in index.tolist():
        try:
            frames.append(as_uint8(dataset[i if relative is None else relative[i]][camera]))
        except Exception as error:  # decoders raise almost anything on damaged files
            raise DecodeError(
                f"frame {i} of dataset {dataset.repo_id!r} at {dataset.root} cannot be read "
                f"({first_line(error)}); fetch or repair the file"
            ) from error
    return torch.stack(frames).to(device)


def _agreement(stored: Tensor, kind: str, tokens: Any, stored_error: float = 0.0) -> Agreement:
    """Compare stored tokens with the LAM's; `stored_error` is what storage costs."""
    expected = (tokens.quantized if kind == VQ else tokens.continuous).cpu()
    tolerance = 0.0 if kind == VQ else TOLERANCE * float(expected.abs().max()) + stored_error
    error = (stored - expected).abs().amax(dim=1)
    others = expected.roll(1, 0)
    return Agreement(
        checked=len(stored),
        equal=int((error <= tolerance).sum()),
        max_error=float(error.max()),
        distinct=len(stored.unique(dim=0)),
        mean_error=float((stored - expected).abs().mean()),
        mean_error_of_others=float((stored - others).abs().mean()),
    )


def refuse_other_tokens(store: TokenStore, lam: Any) -> None:
    """Refuse tokens that another LAM made.

    Raises:
        TokenStoreError: the LAM's fingerprint differs or, for a `.pt` file, the tokens' shape.
    """
    if store.provenance is not None:
        refuse_other_lam(str(store.path), store.provenance.lam, lam)
        return
    token_dim = lam.num_learned_tokens * lam.action_latent_dim
    if store.token_dim != token_dim:
        raise TokenStoreError(
            f"{store.path} has tokens of {store.token_dim} numbers, this LAM makes {token_dim}; pass the LAM "
            "that made it as --lam.path"
        )


def _camera(store: TokenStore, dataset: Any, camera_key: str | None) -> str:
    if store.provenance is None:
        return choose_camera(dataset.meta, camera_key)
    camera = store.provenance.camera_key
    if camera_key not in (None, camera):
        raise TokenStoreError(f"{store.path} was made of {camera}; leave out --camera_key={camera_key}")
    return camera


def _sample(frames: Tensor, tables: TokenStore, dataset: Any, num_samples: int, seed: int) -> Tensor:
    """Random ones of the frames that lie in the opened episodes, as absolute indices, ascending."""
    if dataset.episodes is not None:
        episode = torch.searchsorted(tables.episode_from, frames, right=True) - 1
        frames = frames[torch.isin(episode, torch.tensor(dataset.episodes))]
    chosen = random.Random(seed).sample(range(len(frames)), min(num_samples, len(frames)))
    return frames[sorted(chosen)]
