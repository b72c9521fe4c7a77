"""Tokens kept as they are computed, pair by pair, in any order and by any number of processes.

    <folder>/tables/      a token store that covers no episode: what the tokens are, codebook, episodes
    <folder>/pairs.bin    a record for each frame of the dataset: of the pair that ends in it

    record   pixels  uint64               digest of the pair's pixels
             value   uint8/uint16 (n,)    VQ: code indices
                     float32 (n·a,)       continuous
             check   uint32               CRC-32 of frame, pixels and value; 0: nothing is here yet

Little-endian, without gaps. The file is as long as all records from the start and, on file systems that know
holes, as large as what was written. A record that a crash or another writer left half written fails its check
and counts as not there; so the file needs no lock, and may be left at any moment.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TokenStoreError, not_finite
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.store import BLOCK_ROWS, TokenStore
from lerobot_lam_diffusion.tokens.tensor_file import fsync
from lerobot_lam_diffusion.tokens.writer import write_store

TABLES = "tables"
PAIRS_FILE = "pairs.bin"


class Found(NamedTuple):
    """What the cache knows about some pairs.

    Attributes:
        values: Code indices int32 `(P, n)`, or tokens float32 `(P, n·a)`; zeros where nothing is known.
        known: bool `(P,)`: a value is here, and it was made of these pixels.
        other_pixels: bool `(P,)`: a value is here, but it was made of other pixels.
    """

    values: Tensor
    known: Tensor
    other_pixels: Tensor


class PairCache:
    """An opened cache; see the module's text.

    Attributes:
        path: Its folder.
        tables: What the tokens are, their codebook and the dataset's episodes.
    """

    def __init__(self, path: Path, tables: TokenStore) -> None:
        assert tables.provenance is not None
        self.path = path
        self.tables = tables
        self.provenance = tables.provenance
        width = tables.values.shape[1]
        value = str(tables.values.dtype).removeprefix("torch.")
        self._record = np.dtype(
            [("pixels", "<u8"), ("value", np.dtype(value).newbyteorder("<"), (width,)), ("check", "<u4")]
        )
        size = (path / PAIRS_FILE).stat().st_size
        expected = tables.num_frames * self._record.itemsize
        if size != expected:
            raise TokenStoreError(
                f"{path / PAIRS_FILE} has {size} bytes, expected {expected}: it was truncated or altered. "
                f"Remove the folder {path}; training makes it anew"
            )
        self._writable = os.access(path / PAIRS_FILE, os.W_OK)
        flags = os.O_RDWR if self._writable else os.O_RDONLY
        self._file = os.open(path / PAIRS_FILE, flags | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # in use: `remove` keeps off

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # not opened; or the interpreter is at its end
            os.close(self._file)

    @classmethod
    def make(
        cls, folder: Path, provenance: Provenance, codebook: Tensor, episode_from: Tensor, episode_to: Tensor
    ) -> "PairCache":
        """Open the cache in `folder`, made first if it is not there.

        Args:
            provenance: What the tokens will be. Continuous ones are kept as float32.
            codebook: float32 `(K, a)`.
            episode_from, episode_to: int64 `(E,)`, boundaries of all the dataset's episodes.

        Raises:
            TokenStoreError: what is there is damaged.
            OSError: it cannot be made.
        """
        if is_pair_cache(folder):
            with contextlib.suppress(OSError):  # it may only be read
                os.utime(folder / PAIRS_FILE)
            return cls.open(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        try:
            partial.chmod(0o755)  # mkdtemp makes private folders
            nothing = torch.zeros(len(episode_from), dtype=torch.bool)
            provenance = replace(provenance, storage_dtype="")
            tables = write_store(
                partial / TABLES, provenance, (), codebook, episode_from, episode_to, nothing
            )
            (partial / PAIRS_FILE).touch()
            os.truncate(partial / PAIRS_FILE, tables.num_frames * _record_bytes(tables))
            fsync(partial / PAIRS_FILE)
            try:
                partial.rename(folder)
            except OSError:
                if not is_pair_cache(folder):  # else another process was faster
                    raise
            fsync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "PairCache":
        """Open a cache.

        Raises:
            TokenStoreError: there is none, or it is damaged.
        """
        if not is_pair_cache(folder):
            raise TokenStoreError(
                f"no cache of live tokens at {folder}: expected the folder {TABLES} and {PAIRS_FILE} in it, "
                "as training with --policy.lam_live_cache makes them"
            )
        return cls(folder, TokenStore.load(folder / TABLES))

    @property
    def is_writable(self) -> bool:
        """Whether this process may keep tokens here."""
        return self._writable

    @property
    def num_bytes(self) -> int:
        """On disk, without holes."""
        files = [self.path / PAIRS_FILE, *(self.path / TABLES).iterdir()]
        return sum(file.stat().st_blocks * 512 for file in files)

    @property
    def num_pairs(self) -> int:
        """Frames of the dataset that have a token at all."""
        lengths = self.tables.episode_to - self.tables.episode_from
        return int((lengths - self.tables.frame_stride).clamp(min=0).sum())

    def read(self, frames: Tensor, pixels: Tensor) -> Found:
        """What is here of the pairs that end in `frames`.

        Args:
            frames: Absolute indices, int64 `(P,)`, on the CPU.
            pixels: Digests of the pairs' pixels, int64 `(P,)`, on the CPU.
        """
        size = self._record.itemsize
        rows = bytearray(len(frames) * size)
        present = np.zeros(len(frames), dtype=bool)
        for number, frame in enumerate(frames.tolist()):
            row = os.pread(self._file, size, frame * size)
            present[number] = len(row) == size and self._is_valid(frame, row)
            if present[number]:
                rows[number * size : (number + 1) * size] = row
        records = np.frombuffer(bytes(rows), dtype=self._record)
        same = records["pixels"] == pixels.numpy().astype("<u8")
        return Found(
            self._values(records), torch.from_numpy(present & same), torch.from_numpy(present & ~same)
        )

    def write(self, frames: Tensor, pixels: Tensor, values: Tensor) -> None:
        """Keep the values of the pairs that end in `frames`; arguments as of `read` and `Found`.

        Raises:
            UserError: continuous values that are not finite.
            OSError: the disk is full.
        """
        if values.is_floating_point() and not values.isfinite().all():
            raise UserError("tokens hold NaN or Inf; the LAM or its input is damaged, nothing was stored")
        records = np.zeros(len(frames), dtype=self._record)
        records["pixels"] = pixels.numpy().astype("<u8")
        records["value"] = values.numpy()
        for frame, record in zip(frames.tolist(), records, strict=True):
            record["check"] = self._check(frame, record.tobytes())
            self._write_at(frame * self._record.itemsize, record.tobytes())

    def scan(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """All of the cache, block by block.

        Yields:
            Frames with a token (absolute indices), their values, and how many records of the block are
            neither empty nor whole.

        Raises:
            TokenStoreError: a value that no LAM of this codebook makes.
        """
        size = self._record.itemsize
        for start in range(0, self.tables.num_frames, BLOCK_ROWS):
            count = min(BLOCK_ROWS, self.tables.num_frames - start)
            block = os.pread(self._file, count * size, start * size).ljust(count * size, b"\0")
            records = np.frombuffer(block, dtype=self._record)
            marked = (np.frombuffer(block, dtype=np.uint8).reshape(count, size) != 0).any(1).nonzero()[0]
            valid = [
                row
                for row in marked.tolist()
                if self._is_valid(start + row, records[row : row + 1].tobytes())
            ]
            values = self._values(records[valid])
            frames = torch.tensor(valid, dtype=torch.int64) + start
            self._refuse_impossible(frames, values)
            yield frames, values, len(marked) - len(valid)

    def decode(self, values: Tensor) -> Tensor:
        """Tokens float32 `(P, n·a)` of values."""
        codebook = self.tables.codebook
        return values if codebook is None else codebook[values.long()].flatten(1)

    def to_store(self, folder: Path) -> TokenStore:
        """Write the episodes whose pairs are all here as a token store.

        Raises:
            TokenStoreError: no episode is complete, or a value is impossible.
            FileExistsError: see `writer.refuse_existing`.
        """
        tables = self.tables
        known = torch.zeros(tables.num_frames, dtype=torch.bool)
        for frames, _, _ in self.scan():
            known[frames] = True
        covered = torch.tensor(
            [
                bool(known[min(first + tables.frame_stride, end) : end].all())
                for first, end in zip(tables.episode_from.tolist(), tables.episode_to.tolist(), strict=True)
            ]
        )
        has_tokens = tables.episode_to - tables.episode_from > tables.frame_stride
        if not (covered & has_tokens).any():
            raise TokenStoreError(
                f"{self.path} holds no complete episode yet ({int(known.sum())} of {tables.num_frames} "
                "frames have a token); train on with --policy.lam_live_cache, or extract the tokens with "
                "lerobot-lam-precompute"
            )
        codebook = torch.empty(0) if tables.codebook is None else tables.codebook
        return write_store(
            folder,
            self.provenance,
            self._rows(covered),
            codebook,
            tables.episode_from,
            tables.episode_to,
            covered,
        )

    def _rows(self, covered: Tensor) -> Iterator[Tensor]:
        """Values of the covered episodes' frames, in order; zeros where a frame has no token."""
        tables = self.tables
        for block, (frames, values, _) in enumerate(self.scan()):
            start = block * BLOCK_ROWS
            count = min(BLOCK_ROWS, tables.num_frames - start)
            rows = torch.zeros(count, values.shape[1], dtype=values.dtype)
            rows[frames - start] = values
            frame = torch.arange(start, start + count)
            episode = torch.searchsorted(tables.episode_from, frame, right=True) - 1
            rows[frame - tables.episode_from[episode] < tables.frame_stride] = 0
            yield rows[covered[episode]]

    def _refuse_impossible(self, frames: Tensor, values: Tensor) -> None:
        if self.provenance.token_kind == VQ:
            bad = (values.int() >= self.provenance.lam.num_codes).any(1)
            problem = f"frame {int(frames[bad][0])} has a code past the codebook" if bad.any() else None
        else:
            problem = not_finite(values, "token")
        if problem:
            raise TokenStoreError(f"{self.path} is damaged: {problem}. Remove it; training makes it anew")

    def _values(self, records: np.ndarray) -> Tensor:
        value = records["value"]
        dtype = np.float32 if value.dtype.kind == "f" else np.int32  # torch does little with uint16
        return torch.from_numpy(value.astype(dtype))

    def _is_valid(self, frame: int, row: bytes) -> bool:
        check = int.from_bytes(row[-4:], "little")
        return check != 0 and check == self._check(frame, row)

    def _check(self, frame: int, row: bytes) -> int:
        return zlib.crc32(row[:-4], zlib.crc32(frame.to_bytes(8, "little"))) or 1

    def _write_at(self, offset: int, row: bytes) -> None:
        written = os.pwrite(self._file, row, offset)
        if written < len(row):  # the disk filled up: half a record fails its check
            os.pwrite(self._file, row[written:], offset + written)


def is_pair_cache(folder: Path) -> bool:
    """Whether there is a cache of live tokens, whole or damaged."""
    try:
        return (folder / PAIRS_FILE).is_file() and (folder / TABLES / PROVENANCE_FILE).is_file()
    except (OSError, ValueError):
        return False


def last_used(folder: Path) -> float:
    """When a training last opened or wrote to the cache; seconds since the epoch."""
    return (folder / PAIRS_FILE).stat().st_mtime


def remove_pair_cache(folder: Path) -> bool:
    """Remove a cache that no process has open; whether it was removed."""
    with (folder / PAIRS_FILE).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: who has it open keeps what was removed
            pass
        removed = folder.with_name(f".{folder.name}.partial-removed")  # never half a cache under its name
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
    return True


def _record_bytes(tables: TokenStore) -> int:
    return 8 + tables.values.shape[1] * tables.values.element_size() + 4
