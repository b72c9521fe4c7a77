"""Check a store against the LAM itself: encode a random sample of its frame pairs again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.lam.preprocess import as_uint8
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.provenance import VQ


@dataclass(frozen=True)
class Agreement:
    """How a sample of stored tokens compares with the LAM's.

    Attributes:
        checked: Tokens compared.
        equal: How many are equal: VQ bit for bit, continuous within `TOLERANCE`.
        max_error: Largest absolute difference of any number.
        distinct: Different tokens among them: agreement on one value alone would say little.
    """

    checked: int
    equal: int
    max_error: float
    distinct: int


TOLERANCE = 1e-3
"""For continuous tokens, as a share of their largest number: kernels round differently from one batch shape
or machine to another (a float32 encoder by 1e-6 to 5e-5); other frames give other tokens altogether."""


def recompute_sample(store: TokenStore, dataset: Any, lam: Any, num_samples: int, seed: int = 0) -> Agreement:
    """Encode `num_samples` random pairs of `dataset` again and compare.

    Frames are read by LeRobot's own random access, not by the extraction's decoder.

    Raises:
        TokenStoreError: the store was made by another LAM, or holds no tokens to compare.
    """
    if store.provenance is None:
        raise TokenStoreError(
            f"{store.path} does not say which LAM made it: there is nothing to compare with"
        )
    fingerprint = store.provenance.lam.fingerprint
    if lam.fingerprint != fingerprint:
        raise TokenStoreError(
            f"{store.path} was made by the LAM {store.provenance.lam.path!r} with fingerprint "
            f"{fingerprint[:16]}…, this LAM has {lam.fingerprint[:16]}…; pass the LAM that made it as "
            "--lam.path"
        )
    index = _sample(store, num_samples, seed)
    camera = store.provenance.camera_key
    relative = dataset.absolute_to_relative_idx
    prev, cur = (
        torch.stack(
            [as_uint8(dataset[i if relative is None else relative[i]][camera]) for i in frames.tolist()]
        )
        for frames in (index - store.frame_stride, index)
    )
    tokens = lam.encode_pairs(prev.to(lam.device), cur.to(lam.device))
    expected = (tokens.quantized if store.kind == VQ else tokens.continuous).cpu()
    stored = store.window(index, [0])[:, 0]
    tolerance = 0.0 if store.kind == VQ else TOLERANCE * float(expected.abs().max())
    error = (stored - expected).abs().amax(dim=1)
    return Agreement(
        checked=len(index),
        equal=int((error <= tolerance).sum()),
        max_error=float(error.max()),
        distinct=len(stored.unique(dim=0)),
    )


def _sample(store: TokenStore, num_samples: int, seed: int) -> Tensor:
    """Random absolute indices of frames that have a token, ascending."""
    present = store.frames_with_tokens()
    if not len(present):
        raise TokenStoreError(f"{store.path} holds no tokens: every episode is shorter than its stride")
    generator = torch.Generator().manual_seed(seed)
    return present[torch.randperm(len(present), generator=generator)[:num_samples]].sort().values
