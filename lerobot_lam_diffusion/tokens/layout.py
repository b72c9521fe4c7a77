"""The files of a token store: where they lie, how they are mapped, and when they are damaged."""

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance, ProvenanceError

TENSORS_FILE = "lam_tokens.safetensors"
PROVENANCE_FILE = "lam_tokens.json"
SCAN_ROWS = 1 << 20


class TokenStoreError(UserError):
    """A store that is missing, damaged, of another dataset, or lacks a frame that is asked for."""


def find_folder(path: Path) -> Path:
    """The folder of the store that `path` (the folder, or one of its files) names.

    Raises:
        TokenStoreError: nothing there, or a file is missing.
    """
    folder = path.parent if path.name in (TENSORS_FILE, PROVENANCE_FILE) else path
    if folder.is_file():
        raise TokenStoreError(
            f"no token store at {path}: it is a file; expected the folder that lerobot-lam-precompute made"
        )
    absent = [name for name in (TENSORS_FILE, PROVENANCE_FILE) if not (folder / name).is_file()]
    if not absent:
        return folder
    found = "does not exist" if not folder.exists() else f"has no {' and no '.join(absent)}"
    raise TokenStoreError(
        f"no token store at {path}: {folder} {found}. Expected a folder with {TENSORS_FILE} and "
        f"{PROVENANCE_FILE}, as lerobot-lam-precompute --output_dir={folder} makes it"
    )


def map_store(folder: Path) -> tuple[Provenance, dict[str, Tensor]]:
    """Provenance and tensors of a store; tensors are views of the mapped file, read when they are used.

    Raises:
        TokenStoreError: a file is damaged or newer than this package.
    """
    try:
        provenance = Provenance.read(folder / PROVENANCE_FILE)
    except ProvenanceError as error:
        raise TokenStoreError(str(error)) from error
    path = folder / TENSORS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    problems = _layout_problems(tensors, provenance)
    if problems:
        raise _damaged(path, "; ".join(problems))
    return provenance, tensors


def _damaged(path: Path, what: str) -> TokenStoreError:
    return TokenStoreError(f"{path} is damaged: {what}. Extract the tokens again with lerobot-lam-precompute")


def _layout_problems(tensors: dict[str, Tensor], provenance: Provenance) -> list[str]:
    lam, dataset = provenance.lam, provenance.dataset
    shapes: dict[str, tuple[int | None, ...]] = dict.fromkeys(
        ("episode_from", "episode_to", "episode_row"), (dataset.total_episodes,)
    )
    dtypes: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(shapes, (torch.int64,))
    if provenance.token_kind == VQ:
        shapes |= {
            "indices": (None, lam.num_learned_tokens),
            "codebook": (lam.num_codes, lam.action_latent_dim),
        }
        dtypes |= {"indices": (torch.uint8, torch.uint16), "codebook": (torch.float32,)}
    else:
        shapes |= {"tokens": (None, lam.num_learned_tokens * lam.action_latent_dim)}
        dtypes |= {"tokens": (torch.float32,)}

    problems = [f"tensor {name} is missing" for name in shapes if name not in tensors]
    problems += [f"unexpected tensor {name}" for name in tensors if name not in shapes]
    for name in sorted(shapes.keys() & tensors.keys()):
        tensor, shape = tensors[name], shapes[name]
        if tensor.dtype not in dtypes[name]:
            problems.append(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes[name]))}")
        if tensor.ndim != len(shape) or any(
            want not in (None, have) for have, want in zip(tensor.shape, shape, strict=True)
        ):
            expected = ", ".join("N" if size is None else str(size) for size in shape)
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected ({expected})")
    return problems or _table_problems(tensors, dataset.total_frames)


def _table_problems(tensors: dict[str, Tensor], total_frames: int) -> list[str]:
    """Episodes must tile the dataset's frames, and their rows the store's."""
    start, stop, row = (tensors[name] for name in ("episode_from", "episode_to", "episode_row"))
    lengths = stop - start
    tiled = start[0] == 0 and stop[-1] == total_frames and bool((start[1:] == stop[:-1]).all())
    if not tiled or not bool((start < stop).all()):
        return [f"the episodes do not tile the dataset's {total_frames} frames"]
    covered = row >= 0
    ends = torch.cumsum(lengths[covered], 0)
    num_rows = len(tensors["indices"] if "indices" in tensors else tensors["tokens"])
    expected_rows = int(ends[-1]) if len(ends) else 0
    if num_rows != expected_rows:
        return [f"it has {num_rows} rows of tokens for {expected_rows} covered frames"]
    if not torch.equal(row[covered], ends - lengths[covered]):
        return ["episode_row does not point at consecutive rows"]
    return []


def check_content(folder: Path) -> None:
    """Read all of a store, once per path, size and modification time: hash, finite numbers, valid indices.

    Raises:
        TokenStoreError: the file differs from the one that was written, or holds NaN, Inf or an index past
            the codebook.
    """
    stat = (folder / TENSORS_FILE).stat()
    _check_content_once(folder.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _check_content_once(folder: Path, size: int, mtime_ns: int) -> None:
    path = folder / TENSORS_FILE
    provenance, tensors = map_store(folder)
    digest = sha256_of(path)
    if digest != provenance.tensors_sha256:
        raise _damaged(
            path,
            f"its SHA-256 is {digest[:16]}…, {PROVENANCE_FILE} expects "
            f"{provenance.tensors_sha256[:16]}…: the file was truncated or altered",
        )
    if provenance.token_kind == VQ:
        problem = not_finite(tensors["codebook"], "codebook") or _past_codebook(
            tensors["indices"], provenance
        )
    else:
        problem = not_finite(tensors["tokens"], "token")
    if problem:
        raise _damaged(path, problem)


def not_finite(rows: Tensor, name: str) -> str | None:
    """Where `rows` `(N, D)` first holds NaN or Inf, or None."""
    for start in range(0, len(rows), SCAN_ROWS):
        bad = ~torch.isfinite(rows[start : start + SCAN_ROWS]).all(1)
        if bad.any():
            return f"NaN or Inf in {name} row {start + int(bad.nonzero()[0, 0])}"
    return None


def _past_codebook(indices: Tensor, provenance: Provenance) -> str | None:
    num_codes = provenance.lam.num_codes
    for start in range(0, len(indices), SCAN_ROWS):
        largest = int(indices[start : start + SCAN_ROWS].int().max())
        if largest >= num_codes:
            return f"code index {largest}, but the codebook has {num_codes} rows"
    return None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
