"""Read a user's own `lam_tokens.pt`: a dict with `tokens (N, n·a)` and, perhaps, metadata.

Nothing in such a file says which LAM, dataset or camera it was made with, so it is used with a warning.
"""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.layout import not_finite
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS, VQ
from lerobot_lam_diffusion.utils.errors import TokenStoreError, first_line, shown

WIDEST_TOKEN = 1 << 16

logger = logging.getLogger(__name__)


def read_pt(path: Path, dataset_meta: Any) -> tuple[Tensor, str, int]:
    """Read a `.pt` file of `dataset_meta`'s frames, and warn that nothing vouches for it.

    The file is memory-mapped and read by `torch.load(weights_only=True)`, which executes no code; the format
    of torch before 1.6 is refused.

    Returns:
        Tokens float32 `(N, n·a)`, a row for each frame of the dataset; "vq" or "continuous", as the file
        says, or "vq"; and the frame stride that it says, or 1.

    Raises:
        TokenStoreError: missing, damaged, not a dict of tensors, code inside, wrong shape, NaN or Inf, or
            another number of rows than the dataset has frames.
    """
    if not os.path.exists(path):  # False, not an error, where the name itself is impossible
        raise TokenStoreError(f"no token file at {path}; make a store with lerobot-lam-precompute")
    document = _load(path)
    tokens = _tokens(document, path)
    _check_rows(tokens, path, dataset_meta)
    tokens = tokens.detach().float().clone(memory_format=torch.contiguous_format)  # off the mapped file
    problem = not_finite(tokens, "token")  # after the conversion: float64's large numbers become Inf
    if problem:
        raise TokenStoreError(f"{path}: {problem}; extract the tokens again with lerobot-lam-precompute")

    metadata = _metadata(document)
    stride, use_vq_tokens = metadata.get("frame_stride", 1), metadata.get("use_vq_tokens", True)
    if type(stride) is not int or not 0 < stride < 2**63 or type(use_vq_tokens) is not bool:
        raise TokenStoreError(
            f"{path} says frame_stride = {shown(stride)} and use_vq_tokens = {shown(use_vq_tokens)}, "
            "expected a positive integer and True or False; correct the file, or make a store with "
            "lerobot-lam-precompute"
        )
    logger.warning(
        "%s is unverified: a .pt file says nothing reliable about its LAM, dataset and camera. A store made "
        "by lerobot-lam-precompute is checked.",
        path,
    )
    return tokens, VQ if use_vq_tokens else CONTINUOUS, stride


def _load(path: Path) -> Any:
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files make torch raise almost anything
        raise TokenStoreError(
            f"{path} is refused: it is damaged or not plain tensors, and reading it could execute code "
            f"({shown(first_line(error))}). Save it again with torch.save, or make a store with "
            "lerobot-lam-precompute"
        ) from error


def _check_archive(path: Path) -> None:
    """Check what `torch.load` does not: it would map compressed entries as is, and verifies no checksums."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its entries are compressed, torch.save compresses nothing")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} differs")


def _tokens(document: Any, path: Path) -> Tensor:
    """The tokens, checked before memory is taken for them."""
    tokens = document.get("tokens") if isinstance(document, dict) else None
    if isinstance(tokens, Tensor) and _is_dense_matrix(tokens):
        return tokens
    found = f"tokens {tuple(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else "none"
    raise TokenStoreError(
        f"{path} is not a token file: expected a dict with a float tensor 'tokens' (N, n*a) that holds every "
        f"one of its values, found {found}. Make a store with lerobot-lam-precompute"
    )


def _is_dense_matrix(tokens: Tensor) -> bool:
    """Whether these are float tokens `(N, n·a)` with all values in the file: not a view that repeats any."""
    return (
        tokens.layout == torch.strided
        and tokens.device.type == "cpu"
        and tokens.dtype.is_floating_point
        and tokens.ndim == 2
        and 0 < tokens.shape[1] <= WIDEST_TOKEN
        and tokens.numel() * tokens.element_size() <= tokens.untyped_storage().nbytes()
    )


def _check_rows(tokens: Tensor, path: Path, dataset_meta: Any) -> None:
    if dataset_meta is None:
        raise TokenStoreError(
            f"{path} does not say where episodes begin; open it together with its dataset, or make a store "
            "that stands alone with lerobot-lam-precompute"
        )
    if tokens.shape[0] != dataset_meta.total_frames:
        raise TokenStoreError(
            f"{path} has {tokens.shape[0]} rows, dataset {dataset_meta.repo_id!r} has "
            f"{dataset_meta.total_frames} frames; it was made of another dataset or version. Extract the "
            "tokens with lerobot-lam-precompute"
        )


def _metadata(document: dict) -> dict:
    """Metadata beside the tokens, under `metadata` or at the top level."""
    nested = document.get("metadata")
    return {**document, **(nested if isinstance(nested, dict) else {})}
