"""Ask the kernel to prefetch the rows of a batch."""

import contextlib
import json
import math
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

ITEM_BYTES = {"U8": 1, "I8": 1, "U16": 2, "F16": 2, "BF16": 2, "F32": 4}
"""Bytes per item of each dtype that rows can have."""


class Readahead:
    """Tells the kernel which rows of a mapped file are about to be read.

    Without this hint, random rows are fetched from disk one after another, each with the part of the file
    around it: a batch of 64 rows from 2.5 GB took 400 ms; with it, 1 ms.

    Args:
        path: A file that `safe_open` has accepted.
        names: Names of the tensors whose rows will be read.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._file: mmap.mmap | None = None
        with path.open("rb") as file:
            header = file.read(8)
            header += file.read(struct.unpack("<Q", header)[0])
            with contextlib.suppress(OSError):  # a file system that maps nothing: rows are merely read
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        entries = [entry for name, entry in json.loads(header[8:]).items() if name in set(names)]
        self._regions = [
            (
                len(header) + entry["data_offsets"][0],
                math.prod(entry["shape"][1:]) * ITEM_BYTES[entry["dtype"]],
            )
            for entry in entries
        ]

    def expect(self, rows: Tensor) -> None:
        """Prefetch `rows`, int64 of any shape, which must exist in every tensor."""
        if self._file is None or not hasattr(self._file, "madvise"):  # Windows has no madvise
            return
        for start, row_bytes in self._regions:
            first = (rows.flatten() * row_bytes + start) // mmap.PAGESIZE
            last = (rows.flatten() * row_bytes + start + row_bytes - 1) // mmap.PAGESIZE
            for page, end in set(zip(first.tolist(), last.tolist(), strict=True)):
                self._file.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, (end + 1 - page) * mmap.PAGESIZE)
