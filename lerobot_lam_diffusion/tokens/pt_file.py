"""Read a `.pt` file of `torch.save` without running anything: a zip of plain bytes and one pickle.

`torch.load(weights_only=True)` runs no foreign code either, but what it builds has no bound: deflated entries
grow a thousandfold, a `bytearray` or a cast takes any amount of memory, a key of nested tuples takes forever.
So only the few opcodes that `torch.save` writes for dicts of plain values and tensors are followed here, none
of which calls anything, and a tensor's bytes are read when it is known what they are.
"""

import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lerobot_lam_diffusion.reading import UnreadableError, open_regular, shown
from lerobot_lam_diffusion.tokens.pt_pickle import TensorInFile, read_pickle

PICKLE_BYTES = 1 << 20
READ_BYTES = 1 << 22  # more than any directory or block that is read at once
MOST_ENTRIES = 4096
WIDEST_VIEW = 8  # numbers of a storage for one of its view

_DAMAGED = (  # what zipfile raises for damaged archives
    zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, OSError, EOFError, ValueError, OverflowError,
    NotImplementedError, RuntimeError, KeyError, IndexError,
)  # fmt: skip


class PtFile:
    """An opened `.pt` file.

    Attributes:
        document: What was saved; a tensor in it is a `TensorInFile`.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        entries = {entry.filename: entry for entry in archive.infolist()}
        _check_entries(archive.infolist(), entries)
        self._archive = archive
        self._entries = entries
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise UnreadableError(
                f"it has {len(pickles)} entries data.pkl, expected one, as torch.save writes"
            )
        self._prefix = pickles[0].removesuffix("data.pkl")
        if entries[pickles[0]].file_size > PICKLE_BYTES:
            raise UnreadableError(f"beside its tensors it has more than {PICKLE_BYTES} bytes")
        order = f"{self._prefix}byteorder"
        if order in entries and self._read(order, len("little")) != sys.byteorder.encode():
            raise UnreadableError("it was written on a machine of the other byte order")
        self.document = read_pickle(self._read(pickles[0], PICKLE_BYTES))

    def tensor(self, place: TensorInFile) -> Tensor:
        """A tensor of the file, in memory of its own.

        Raises:
            UnreadableError: it declares more elements than the file holds, or its bytes are damaged.
        """
        name = f"{self._prefix}data/{place.key}"
        stored = self._entries[name].file_size if name in self._entries else 0
        item = place.dtype.itemsize
        count, last = 1, place.offset
        for size, stride in zip(place.shape, place.stride, strict=True):
            count *= size
            last += (size - 1) * stride
        if place.storage_size * item != stored or (count and last >= place.storage_size):
            raise UnreadableError(f"a tensor of shape {shown(place.shape)} reaches past its {stored} bytes")
        if not count:
            return torch.empty(place.shape, dtype=place.dtype)
        if count > place.storage_size or place.storage_size > WIDEST_VIEW * count:
            raise UnreadableError(
                f"a tensor of shape {shown(place.shape)} is a view of {place.storage_size} numbers; save "
                "tokens.contiguous().clone()"
            )
        storage = torch.empty(place.storage_size, dtype=place.dtype)
        self._read_into(name, memoryview(storage.view(torch.uint8).numpy()))
        return storage.as_strided(place.shape, place.stride, place.offset)

    def _read(self, name: str, at_most: int) -> bytes:
        size = self._entries[name].file_size
        if size > at_most:
            raise UnreadableError(f"{shown(name)} has {size} bytes, expected at most {at_most}")
        content = bytearray(size)
        self._read_into(name, memoryview(content))
        return bytes(content)

    def _read_into(self, name: str, buffer: memoryview) -> None:
        try:
            with self._archive.open(self._entries[name]) as entry:
                while buffer:
                    block = entry.read(min(len(buffer), READ_BYTES // 2))
                    if not block:
                        raise UnreadableError(f"{shown(name)} is cut short")
                    buffer[: len(block)] = block
                    buffer = buffer[len(block) :]
                entry.read(1)  # the end of an entry is where its checksum is compared
        except _DAMAGED as error:
            raise UnreadableError(f"{shown(name)} is damaged ({shown(str(error))})") from error


@contextmanager
def open_pt_file(path: Path) -> Iterator[PtFile]:
    """Open a `.pt` file; its tensors can be read inside the `with`.

    Raises:
        UnreadableError: not a file that `torch.save` wrote of plain values and tensors, or damaged.
    """
    with open_regular(path) as file:
        try:
            archive = zipfile.ZipFile(_Bounded(file))
        except _DAMAGED as error:
            raise UnreadableError(f"no zip as torch.save writes it ({shown(str(error))})") from error
        yield PtFile(archive)


class _Bounded:
    """A file that reads a bounded number of bytes at once: zipfile reads as much as a file claims to need."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self._read(size if 0 <= size <= READ_BYTES else READ_BYTES + 1)
        if len(content) > READ_BYTES:
            raise UnreadableError("its directory is larger than that of any file of torch.save")
        return content


def _check_entries(infos: list[zipfile.ZipInfo], entries: dict[str, zipfile.ZipInfo]) -> None:
    if len(infos) > MOST_ENTRIES or len(entries) < len(infos):
        raise UnreadableError("it has too many entries, or two of one name")
    for info in infos:
        # Stored as they are: nothing can grow while it is read.
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UnreadableError(f"{shown(info.filename)} is compressed, torch.save compresses nothing")
