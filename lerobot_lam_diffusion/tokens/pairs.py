"""Tokens kept as they are computed, pair by pair, in any order and by any number of processes.

    <folder>/tables/      a token store that covers no episode: what the tokens are, codebook, episodes
    <folder>/pairs.bin    a record for each frame of the dataset: of the pair that ends in it

    record   pixels  uint64               digest of the pair's pixels
             value   uint8/uint16 (n,)    VQ: code indices
                     float32 (n·a,)       continuous
             check   uint32               CRC-32 of frame, pixels and value; 0: record is empty

Little-endian, without padding. The file has its full length from the start, but on file systems that support
sparse files it takes up only the space that was written. A record left half-written by a crash or another
writer fails its check and counts as absent; so the file needs no lock, and writing may stop at any moment.
"""

import contextlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE
from lerobot_lam_diffusion.tokens.provenance import Provenance
from lerobot_lam_diffusion.tokens.store import BLOCK_ROWS, TokenStore
from lerobot_lam_diffusion.tokens.writer import write_store
from lerobot_lam_diffusion.utils.errors import TokenStoreError
from lerobot_lam_diffusion.utils.files import whole_or_nothing

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
        is_writable: Whether this process may keep tokens here.
    """

    def __init__(self, path: Path, tables: TokenStore) -> None:
        assert tables.provenance is not None
        self.path = path
        self.tables = tables
        self.provenance = tables.provenance
        self._record = _record_of(tables)
        size = (path / PAIRS_FILE).stat().st_size
        expected = tables.num_frames * self._record.itemsize
        if size != expected:
            raise TokenStoreError(
                f"{path / PAIRS_FILE} has {size} bytes, expected {expected}: it was truncated or altered. "
                f"Remove the folder {path}; training builds it again"
            )
        self.is_writable = os.access(path / PAIRS_FILE, os.W_OK)
        self._file = (path / PAIRS_FILE).open("r+b" if self.is_writable else "rb", buffering=0)

    def __reduce__(self) -> tuple:
        return (PairCache.open, (self.path,))  # a copy has a file of its own

    @classmethod
    def make(
        cls, folder: Path, provenance: Provenance, codebook: Tensor, episode_from: Tensor, episode_to: Tensor
    ) -> "PairCache":
        """Open the cache in `folder`, creating it first if it does not exist.

        Args:
            provenance: What the tokens will be. Continuous ones are stored as float32.
            codebook: float32 `(K, a)`.
            episode_from, episode_to: int64 `(E,)`, boundaries of all the dataset's episodes.

        Raises:
            TokenStoreError: the existing cache is damaged.
            OSError: the cache cannot be created.
        """
        if is_pair_cache(folder):
            with contextlib.suppress(OSError):  # it may only be read
                os.utime(folder / PAIRS_FILE)
            return cls.open(folder)
        nothing = torch.zeros(len(episode_from), dtype=torch.bool)
        provenance = replace(provenance, storage_dtype="")
        try:
            with whole_or_nothing(folder) as partial:
                partial.mkdir()
                tables = write_store(
                    partial / TABLES, provenance, (), codebook, episode_from, episode_to, nothing
                )
                (partial / PAIRS_FILE).touch()
                os.truncate(partial / PAIRS_FILE, tables.num_frames * _record_of(tables).itemsize)
        except OSError:
            if not is_pair_cache(folder):  # else another process was faster
                raise
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
    def num_pairs(self) -> int:
        """Frames of the dataset that have a token at all."""
        lengths = self.tables.episode_to - self.tables.episode_from
        return int((lengths - self.tables.frame_stride).clamp(min=0).sum())

    def read(self, frames: Tensor, pixels: Tensor) -> Found:
        """Look up the pairs that end in `frames`.

        Args:
            frames: Absolute indices, int64 `(P,)`, on the CPU.
            pixels: Digests of the pairs' pixels, int64 `(P,)`, on the CPU.
        """
        size = self._record.itemsize
        rows = bytearray(len(frames) * size)
        present = np.zeros(len(frames), dtype=bool)
        for number, frame in enumerate(frames.tolist()):
            if not 0 <= frame < self.tables.num_frames:
                continue  # of another dataset
            row = os.pread(self._file.fileno(), size, frame * size)
            present[number] = len(row) == size and self._is_valid(frame, row)
            if present[number]:
                rows[number * size : (number + 1) * size] = row
        records = np.frombuffer(bytes(rows), dtype=self._record)
        same = records["pixels"] == pixels.numpy().astype("<u8")
        return Found(
            self._values(records), torch.from_numpy(present & same), torch.from_numpy(present & ~same)
        )

    def write(self, frames: Tensor, pixels: Tensor, values: Tensor) -> None:
        """Store the values of the pairs that end in `frames`; for the arguments, see `read` and `Found`.

        Frames that the dataset does not have are ignored.

        Raises:
            UserError: continuous values that are not finite.
            OSError: the disk is full.
        """
        if values.is_floating_point() and not values.isfinite().all():
            raise TokenStoreError(
                "tokens hold NaN or Inf; the LAM or its input is damaged, nothing was stored"
            )
        records = np.zeros(len(frames), dtype=self._record)
        records["pixels"] = pixels.numpy().astype("<u8")
        records["value"] = values.numpy()
        for frame, record in zip(frames.tolist(), records, strict=True):
            if not 0 <= frame < self.tables.num_frames:
                continue
            record["check"] = self._check(frame, record.tobytes())
            self._write_at(frame * self._record.itemsize, record.tobytes())

    def scan(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Read the whole cache, block by block.

        Yields:
            Frames with a token (absolute indices), their values, and how many records in the block are
            neither empty nor intact.
        """
        size = self._record.itemsize
        for start in range(0, self.tables.num_frames, BLOCK_ROWS):
            count = min(BLOCK_ROWS, self.tables.num_frames - start)
            block = os.pread(self._file.fileno(), count * size, start * size).ljust(count * size, b"\0")
            records = np.frombuffer(block, dtype=self._record)
            marked = (np.frombuffer(block, dtype=np.uint8).reshape(count, size) != 0).any(1).nonzero()[0]
            valid = [
                row
                for row in marked.tolist()
                if self._is_valid(start + row, records[row : row + 1].tobytes())
            ]
            values = self._values(records[valid])
            frames = torch.tensor(valid, dtype=torch.int64) + start
            yield frames, values, len(marked) - len(valid)

    def decode(self, values: Tensor) -> Tensor:
        """Tokens float32 `(P, n·a)` of values."""
        codebook = self.tables.codebook
        return values if codebook is None else codebook[values.long()].flatten(1)

    def no_values(self, count: int) -> Tensor:
        """Zeros in the place of `count` values."""
        return self._values(np.zeros(count, dtype=self._record))

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
        written = os.pwrite(self._file.fileno(), row, offset)
        if written < len(row):  # the disk filled up: half a record fails its check
            os.pwrite(self._file.fileno(), row[written:], offset + written)


def is_pair_cache(folder: Path) -> bool:
    """Whether there is a cache of live tokens, whole or damaged."""
    return isfile(folder / PAIRS_FILE) and isfile(folder / TABLES / PROVENANCE_FILE)


def bytes_on_disk(folder: Path) -> int:
    """Disk space that the cache takes up, without the holes of sparse files."""
    files = [folder / PAIRS_FILE, *(folder / TABLES).iterdir()]
    return sum(file.stat().st_blocks * 512 for file in files)


def last_used(folder: Path) -> float:
    """When a training last opened or wrote to the cache; seconds since the epoch."""
    return (folder / PAIRS_FILE).stat().st_mtime


def _record_of(tables: TokenStore) -> np.dtype:
    """Layout of one record; see the module's text."""
    value = np.dtype(str(tables.values.dtype).removeprefix("torch.")).newbyteorder("<")
    return np.dtype([("pixels", "<u8"), ("value", value, (tables.values.shape[1],)), ("check", "<u4")])
