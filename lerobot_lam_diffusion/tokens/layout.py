"""The files of a token store: where they lie, how they are mapped, and when they are damaged."""

import logging
from os.path import isfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lerobot_lam_diffusion.tokens import checked
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.storage import row_tensors
from lerobot_lam_diffusion.utils.errors import TokenStoreError, first_line, shown
from lerobot_lam_diffusion.utils.files import check_regular, refuse_existing, sha256_of

logger = logging.getLogger(__name__)

TENSORS_FILE = "lam_tokens.safetensors"
PROVENANCE_FILE = "lam_tokens.json"
EPISODE_HASH = "episode_hash"  # absent in stores of format version 1 and 2
EPISODE_TABLE = ("episode_from", "episode_to", "episode_row")
SCAN_ROWS = 1 << 16
HASH_BYTES = 16


def unfinished_folder(folder: Path) -> Path:
    """Where the finished parts of the store `folder` lie while it is extracted."""
    resolved = folder.resolve()
    return resolved.with_name(f"{resolved.name}.shards")


def refuse_occupied(folder: Path) -> None:
    """Refuse to write a store where something is already, or where one is being extracted.

    Raises:
        FileExistsError: see `refuse_existing`; or an unfinished extraction is there.
    """
    refuse_existing(folder)
    if unfinished_folder(folder).is_dir():
        raise FileExistsError(
            f"a store is being extracted into {folder} ({unfinished_folder(folder)}); choose another "
            "--output_dir, or finish or remove that extraction first"
        )


def find_folder(path: Path) -> Path:
    """The folder of the store that `path` (the folder, or one of its files) names.

    Raises:
        TokenStoreError: nothing there, or a file is missing.
    """
    folder = path.parent if path.name in (TENSORS_FILE, PROVENANCE_FILE) else path
    absent = [name for name in (TENSORS_FILE, PROVENANCE_FILE) if not isfile(folder / name)]
    if not absent:
        return folder
    try:
        unfinished = unfinished_folder(folder)
        is_unfinished = unfinished.is_dir()
        found = "is a file" if folder.exists() else "does not exist"
        if folder.is_dir():
            found = f"has no {' and no '.join(absent)}"
    except (OSError, RuntimeError, ValueError) as error:  # too long, no access; a circle of links; a NUL
        raise TokenStoreError(
            f"no token store at {shown(str(path), 500)}: it cannot be looked up ({error}). Correct the path, "
            "or make a store with lerobot-lam-precompute"
        ) from error
    if is_unfinished:
        raise TokenStoreError(
            f"no token store at {path} yet: its extraction is unfinished ({unfinished}); run the same "
            "lerobot-lam-precompute command again to go on"
        )
    raise TokenStoreError(
        f"no token store at {path}: {folder} {found}. Expected a folder with {TENSORS_FILE} and "
        f"{PROVENANCE_FILE}, as lerobot-lam-precompute --output_dir={folder} makes it"
    )


def map_store(folder: Path) -> tuple[Provenance, dict[str, Tensor]]:
    """Provenance and tensors of a store; tensors are views of the mapped file, read on demand.

    If a file is truncated, or its disk fails, while it is mapped, processes that read the lost part are
    killed (SIGBUS); this process cannot turn that into an error. So our code never changes a store in place:
    it replaces the store with a new file, and the old one lives on for processes that have mapped it. Do the
    same (`mv`, `rsync` without `--inplace`).

    Raises:
        TokenStoreError: a file is damaged, newer than this package, or cannot be mapped.
    """
    provenance = Provenance.read(folder / PROVENANCE_FILE)
    path = folder / TENSORS_FILE
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise TokenStoreError(
            f"{path} cannot be opened and mapped into memory ({first_line(error)}). If its file system "
            "maps no files, copy the store to another one and point to the copy"
        ) from error
    except (SafetensorError, ValueError, RuntimeError, MemoryError) as error:
        raise _damaged(path, first_line(error)) from error
    problems = _layout_problems(tensors, provenance)
    if problems:
        raise _damaged(path, "; ".join(problems))
    return provenance, tensors


def _damaged(path: Path, what: str) -> TokenStoreError:
    return TokenStoreError(f"{path} is damaged: {what}. Extract the tokens again with lerobot-lam-precompute")


def tensor_layout(provenance: Provenance, num_rows: int | None) -> dict[str, tuple[torch.dtype, tuple]]:
    """Name → dtype and shape of every tensor of a store; `num_rows` None: whatever number there is."""
    lam = provenance.lam
    table = (torch.int64, (provenance.dataset.total_episodes,))
    tensors: dict[str, tuple[torch.dtype, tuple]] = dict.fromkeys(EPISODE_TABLE, table)
    tensors |= {EPISODE_HASH: (torch.uint8, (provenance.dataset.total_episodes, HASH_BYTES))}
    if provenance.token_kind == VQ:
        tensors |= {"codebook": (torch.float32, (lam.num_codes, lam.action_latent_dim))}
    rows = row_tensors(
        provenance.token_kind, provenance.storage_dtype, lam.num_learned_tokens, lam.action_latent_dim
    )
    return tensors | {name: (dtype, (num_rows, *shape)) for name, (dtype, shape) in rows.items()}


def unknown_hashes(num_episodes: int) -> Tensor:
    """Hashes uint8 `(E, 16)` of episodes whose frames are not known."""
    return torch.zeros(num_episodes, HASH_BYTES, dtype=torch.uint8)


def _layout_problems(tensors: dict[str, Tensor], provenance: Provenance) -> list[str]:
    expected = tensor_layout(provenance, None)
    required = expected.keys() - {EPISODE_HASH}
    problems = [f"tensor {name} is missing" for name in expected if name in required - tensors.keys()]
    unexpected = sorted(tensors.keys() - expected.keys())
    problems += [f"unexpected tensor {shown(name)}" for name in unexpected[:10]]
    for name in sorted(expected.keys() & tensors.keys()):
        tensor, (dtype, shape) = tensors[name], expected[name]
        if tensor.dtype != dtype:
            problems.append(f"{name} is {tensor.dtype}, expected {dtype}")
        if tensor.ndim != len(shape) or any(
            want not in (None, have) for have, want in zip(tensor.shape, shape, strict=True)
        ):
            axes = ", ".join("N" if size is None else str(size) for size in shape)
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected ({axes})")
    return problems or _table_problems(tensors, provenance)


def _table_problems(tensors: dict[str, Tensor], provenance: Provenance) -> list[str]:
    """Episodes must tile the dataset's frames, and their rows the store's."""
    start, stop, row = (tensors[name] for name in EPISODE_TABLE)
    total_frames = provenance.dataset.total_frames
    lengths = stop - start
    tiled = start[0] == 0 and stop[-1] == total_frames and bool((start[1:] == stop[:-1]).all())
    if not tiled or not bool((start < stop).all()):
        return [f"the episodes do not tile the dataset's {total_frames} frames"]
    covered = row >= 0
    ends = torch.cumsum(lengths[covered], 0)
    expected_rows = int(ends[-1]) if len(ends) else 0
    for name in ("indices", "tokens", "row_scale"):
        if name in tensors and len(tensors[name]) != expected_rows:
            what = "tokens" if name != "row_scale" else name
            return [f"it has {len(tensors[name])} rows of {what} for {expected_rows} covered frames"]
    if not torch.equal(row[covered], ends - lengths[covered]):
        return ["episode_row does not point at consecutive rows"]
    both = [episode for episode in provenance.skipped if covered[int(episode)]]
    return [f"it covers episode {both[0]}, which {PROVENANCE_FILE} calls skipped"] if both else []


def check_content(folder: Path, *, again: bool = False) -> None:
    """Check a whole store (hash, finite numbers, valid indices), once per size, times and inode of its files.

    Args:
        folder: Folder of the store.
        again: Read it even if it was checked before.

    Raises:
        TokenStoreError: the file differs from the one that was written, or holds NaN, Inf or an index past
            the codebook.
    """
    seen = stamp_of(folder)  # before the reading: what changes meanwhile is read again
    if not again and checked.recall(checked.place_of("checked", folder), seen):
        return
    provenance, _ = map_store(folder)
    path = folder / TENSORS_FILE
    try:
        digest = sha256_of(path)
        if digest != provenance.tensors_sha256:
            raise _damaged(
                path,
                f"its SHA-256 is {digest[:16]}…, {PROVENANCE_FILE} expects "
                f"{provenance.tensors_sha256[:16]}…: the file was truncated or altered",
            )
        # Read, not mapped, so that a file that becomes shorter meanwhile is an error.
        with safe_open(path, framework="pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118
                rows = file.get_slice(name)
                total = rows.get_shape()[0]
                for start in range(0, total, SCAN_ROWS):
                    problem = _content_problem(
                        name, rows[start : min(start + SCAN_ROWS, total)], start, provenance
                    )
                    if problem:
                        raise _damaged(path, problem)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, first_line(error)) from error
    checked.note(checked.place_of("checked", folder), seen, True)


def stamp_of(folder: Path) -> str:
    """What the files of a store look like from outside; see `checked.py`."""
    return checked.stamp_of((folder / TENSORS_FILE, folder / PROVENANCE_FILE), folder)


def _content_problem(name: str, block: Tensor, first_row: int, provenance: Provenance) -> str | None:
    if name == "indices":
        largest = int(block.int().max())
        num_codes = provenance.lam.num_codes
        return (
            f"code index {largest}, but the codebook has {num_codes} rows" if largest >= num_codes else None
        )
    if name == "row_scale":  # what it makes of the largest int8
        return not_finite(block.unsqueeze(1) * 128, "token", first_row)
    if block.is_floating_point():
        return not_finite(block, name.removesuffix("s"), first_row)
    return None


def not_finite(rows: Tensor, name: str, first_row: int = 0) -> str | None:
    """Where `rows` `(N, D)` first hold NaN or Inf, counting rows from `first_row`, or None."""
    for start in range(0, len(rows), SCAN_ROWS):
        bad = ~torch.isfinite(rows[start : start + SCAN_ROWS]).all(1)
        if bad.any():
            return f"NaN or Inf in {name} row {first_row + start + int(bad.nonzero()[0, 0])}"
    return None
