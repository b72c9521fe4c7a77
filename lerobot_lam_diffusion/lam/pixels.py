"""A 64-bit digest of the pixels of a frame pair."""

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest


def pixel_digests(prev: Tensor, cur: Tensor) -> Tensor:
    """A digest of each frame pair and its size, int64 `(P,)` on the CPU; not cryptographic.

    Args:
        prev, cur: uint8 `(P, 3, H, W)`.
    """
    height, width = prev.shape[-2:]
    pairs = torch.stack([prev, cur], dim=1).flatten(1).cpu().numpy()
    digests = [xxh3_64_intdigest(pair, height << 32 | width) for pair in pairs]
    return torch.from_numpy(np.array(digests, dtype=np.uint64).view(np.int64))
