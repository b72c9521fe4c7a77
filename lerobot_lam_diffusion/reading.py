"""Read files that may be damaged or hostile: never a device, never without end, never more than expected.

What is wrong is told as a reason alone; the caller knows which file it is and what to do about it.
"""

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

DOCUMENT_BYTES = 1 << 20  # our largest are some kilobytes


class UnreadableError(ValueError):
    """Why a file cannot be read; its message is a phrase, without the file's name."""


def is_file(path: Path) -> bool:
    """Whether `path` is, or links to, a regular file; no where nobody can tell (no access, name too long)."""
    try:
        return path.is_file()
    except OSError:
        return False


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, also through links (the Hub's cache consists of them).

    Raises:
        UnreadableError: absent, a folder, a pipe or a device: those could block, or never end.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe waits for its writer. It means nothing to regular files.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UnreadableError(_reason(error)) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnreadableError("it is a folder, a pipe or a device, expected a file")
    return os.fdopen(handle, "rb")


def read_exactly(file: BinaryIO, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes from `offset` on.

    Raises:
        UnreadableError: the file ends before (somebody shortens it), or the disk fails.
    """
    try:
        file.seek(offset)
        while buffer:
            count = file.readinto(buffer)  # type: ignore[attr-defined]
            if not count:
                raise UnreadableError(f"it ends {len(buffer)} bytes too early")
            buffer = buffer[count:]
    except OSError as error:
        raise UnreadableError(_reason(error)) from error


def read_json(path: Path, at_most: int = DOCUMENT_BYTES) -> Any:
    """A small JSON document.

    Raises:
        UnreadableError: see `open_regular` and `parse_json`; or larger than `at_most` bytes.
    """
    with open_regular(path) as file:
        try:
            content = file.read(at_most + 1) or b""  # None: from a file that only looks regular, in /proc
        except OSError as error:
            raise UnreadableError(_reason(error)) from error
    if len(content) > at_most:
        raise UnreadableError(f"it is larger than {at_most} bytes, no such document is")
    return parse_json(content)


def parse_json(content: bytes) -> Any:
    """JSON in UTF-8, whose objects name each key once.

    Raises:
        UnreadableError: not that; or nested too deeply, or text in it cannot be printed (half a surrogate).
    """
    try:
        document = json.loads(content.decode(), object_pairs_hook=_once)
        json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise UnreadableError("it is nested too deeply") from None
    except ValueError as error:  # no UTF-8, no JSON, a number of 5,000 digits, half a surrogate
        raise UnreadableError(_reason(error)) from error
    return document


def shown(value: Any, at_most: int = 80) -> str:
    """`repr` for a message: of bounded length and cost, also of values whose `repr` fails or never ends."""
    cut = reprlib.Repr(maxlevel=3, maxstring=at_most, maxlong=at_most, maxother=at_most)
    try:
        text = cut.repr(value)
    except (RecursionError, ValueError):  # an integer of more than 4,300 digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= at_most else f"{text[: at_most - 1]}…"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise UnreadableError(f"the key {shown(name)} occurs twice")
        values[name] = value
    return values


def _reason(error: Exception) -> str:
    """One line of bounded length: messages of decoders can quote the whole input."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = (text.splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:199]}…"
