"""The weights file of a model folder, opened once for its check, its hash and its tensors.

It is read, not mapped: a process that maps a file is killed (SIGBUS) when another one shortens it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch import Tensor

from lerobot_lam_diffusion.reading import UnreadableError, open_regular, read_exactly
from lerobot_lam_diffusion.safetensors_header import Entry, read_header, read_tensor

from .config import CONFIG_FILE
from .errors import LamError
from .locating import WEIGHTS_FILE

_BLOCK_BYTES = 1 << 20


class Weights(NamedTuple):
    """An opened weights file; `entries`: key → dtype, shape and place. Its methods raise LamError."""

    path: Path
    file: BinaryIO
    entries: dict[str, Entry]

    def tensor(self, key: str) -> Tensor:
        """A tensor in memory of its own."""
        try:
            return read_tensor(self.file, self.entries[key])
        except UnreadableError as error:
            raise _unreadable(self.path, error) from error

    def blocks(self, key: str) -> Iterator[memoryview]:
        """A tensor's bytes, block by block."""
        _, _, offset, rest = self.entries[key]
        buffer = memoryview(bytearray(min(rest, _BLOCK_BYTES)))
        while rest:
            block = buffer[: min(rest, _BLOCK_BYTES)]
            try:
                read_exactly(self.file, offset, block)
            except UnreadableError as error:
                raise _unreadable(self.path, error) from error
            yield block
            offset, rest = offset + len(block), rest - len(block)


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """The weights of a model folder; its header is checked, no tensor is read.

    Raises:
        LamError: absent, or no safetensors file.
    """
    path = folder / WEIGHTS_FILE
    try:
        file = open_regular(path)
    except UnreadableError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise LamError(
                f"{path} does not exist, expected the weights beside {CONFIG_FILE}. "
                "Fetch the model again (with git: `git lfs pull`)."
            ) from None
        raise _unreadable(path, error) from error
    with file:
        try:
            entries = read_header(file)
        except UnreadableError as error:
            raise _unreadable(path, error) from error
        yield Weights(path, file, entries)


def _unreadable(path: Path, reason: UnreadableError) -> LamError:
    return LamError(
        f"{path} is no readable safetensors file ({reason}), expected the weights of a LAM. "
        "Fetch the model again; a file of some hundred bytes is a git-lfs pointer (`git lfs pull`)."
    )
