"""A `.safetensors` file, written and read block by block.

safetensors' own `save_file` holds all of a file in memory; a store of 100 million frames has to be written
beside a training. The bytes are those that `save_file` would write.
"""

import contextlib
import errno
import json
import logging
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
}
ORDER = list(NAMES)
DTYPES = {name: dtype for dtype, name in NAMES.items()}
ALIGNMENT = 8
NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""What file systems answer to a call that they do not have."""
BLOCK_BYTES = 1 << 22

Shape = tuple[int, ...]


class TensorFileWriter:
    """Writes the tensors of one file, each from its first row to its last, in any interleaving.

    Args:
        path: A new file.
        tensors: Name → dtype and shape of every tensor.

    A context manager.

    Raises:
        ValueError: at the end, a tensor has fewer rows than announced.
        OSError: the disk is full or not writable.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Shape]]) -> None:
        header, regions = _layout(tensors)
        self._tensors = dict(tensors)
        self._next = {name: start for name, (start, _) in regions.items()}
        self._end = {name: end for name, (_, end) in regions.items()}
        self._file: FileIO = path.open("xb", buffering=0)
        self._put(0, memoryview(header))

    def write(self, name: str, rows: Tensor) -> None:
        """Append `rows` `(b, ...)` to the tensor `name`.

        Raises:
            ValueError: another dtype or width than announced, or more rows.
        """
        dtype, shape = self._tensors[name]
        if rows.dtype != dtype or tuple(rows.shape[1:]) != shape[1:]:
            raise ValueError(f"{name} is {dtype} {shape}, given rows of {rows.dtype} {tuple(rows.shape)}")
        content = memoryview(rows.contiguous().view(-1).view(torch.uint8).numpy()) if rows.numel() else b""
        start = self._next[name]
        if start + len(content) > self._end[name]:
            raise ValueError(f"more rows than the {shape[0]} announced for {name}")
        self._put(start, memoryview(content))
        self._next[name] = start + len(content)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        short = [name for name in self._tensors if self._next[name] < self._end[name]]
        if kind is None and short:
            told = ", ".join(f"the {self._tensors[name][1][0]} announced for {name}" for name in short)
            raise ValueError(f"fewer rows than {told}")

    def _put(self, at: int, content: memoryview) -> None:
        self._file.seek(at)
        while content:  # unbuffered: a write may take a part only
            content = content[self._file.write(content) :]


def _layout(
    tensors: Mapping[str, tuple[torch.dtype, Shape]],
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header of a file, and where in the file each tensor's bytes begin and end.

    Wide dtypes come first, as safetensors has it, so that every tensor is aligned to its dtype.
    """
    offset = 0
    document, regions = {}, {}
    for name in sorted(tensors, key=lambda name: (-ORDER.index(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        document[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        regions[name] = (offset, end)
        offset = end
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: (len(header) + start, len(header) + end) for name, (start, end) in regions.items()}


def read_blocks(path: Path, see: Callable[[bytes | memoryview], None]) -> Iterator[tuple[str, Tensor]]:
    """All of a file in its order, as blocks of whole rows that fit in memory.

    Args:
        path: A file that `safe_open` has accepted: its tensors fill it without a gap.
        see: Is given every byte of the file, in order; for a hash.

    Yields:
        Name of a tensor and its next rows, valid until the next block is asked for.
    """
    with path.open("rb") as file:
        header = file.read(8)
        header += file.read(struct.unpack("<Q", header)[0])
        see(header)
        for name, entry in sorted(_entries(header).items(), key=lambda item: item[1]["data_offsets"]):
            dtype, (rows, *width) = DTYPES[entry["dtype"]], entry["shape"]
            row_bytes = math.prod(width) * dtype.itemsize
            at_once = max(BLOCK_BYTES // row_bytes, 1)
            buffer = bytearray(min(at_once, rows) * row_bytes)
            for start in range(0, rows, at_once):
                block = memoryview(buffer)[: min(at_once, rows - start) * row_bytes]
                if file.readinto(block) != len(block):
                    raise OSError(f"{path} became shorter while it was read")
                see(block)
                yield name, torch.frombuffer(block, dtype=dtype).view(-1, *width)


def _entries(header: bytes) -> dict[str, dict]:
    document = json.loads(header[8:])
    document.pop("__metadata__", None)
    return document


class Readahead:
    """Tells the kernel which rows of a mapped file will be read in a moment.

    Where random rows are merely read, the disk is asked for one after the other, each with a stretch of file
    around it: a batch of 64 out of 2.5 GB took 400 ms, told in advance 1 ms.

    Args:
        path: A file that `safe_open` has accepted.
        names: Those of its tensors whose rows will be read.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._file: mmap.mmap | None = None
        with path.open("rb") as file:
            header = file.read(8)
            header += file.read(struct.unpack("<Q", header)[0])
            with contextlib.suppress(OSError):  # a file system that maps nothing: rows are merely read
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        entries = [entry for name, entry in _entries(header).items() if name in set(names)]
        self._regions = [
            (
                len(header) + entry["data_offsets"][0],
                math.prod(entry["shape"][1:]) * DTYPES[entry["dtype"]].itemsize,
            )
            for entry in entries
        ]

    def expect(self, rows: Tensor) -> None:
        """Rows int64, of any shape, that exist in each of the tensors."""
        if self._file is None or not hasattr(self._file, "madvise"):  # Windows has no madvise
            return
        for start, row_bytes in self._regions:
            first = (rows.flatten() * row_bytes + start) // mmap.PAGESIZE
            last = (rows.flatten() * row_bytes + start + row_bytes - 1) // mmap.PAGESIZE
            for page, end in set(zip(first.tolist(), last.tolist(), strict=True)):
                self._file.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, (end + 1 - page) * mmap.PAGESIZE)


def map_array(path: Path) -> np.ndarray:
    """The array in a `.npy` file, mapped (changes stay in memory), or read where files cannot be mapped."""
    try:
        return np.load(path, mmap_mode="c")
    except OSError as error:
        array = np.load(path)
        logger.warning("%s cannot be mapped (%s): all of it is read into memory.", path, error)
        return array


def fsync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's entries, before anything relies on them.

    Folders are synced where the file system can (CIFS and some FUSE file systems cannot).

    Raises:
        OSError: the disk did not take a file's bytes.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            sync_file(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not path.is_dir():
            raise
        logger.debug("folder %s cannot be synced: %s", path, error)


def sync_file(handle: int) -> None:
    """`os.fsync`, where the file system has it.

    Raises:
        OSError: the disk did not take the bytes.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
