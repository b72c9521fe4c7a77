"""Keep a console readable: send everything that a library prints to a log, and progress to the terminal.

    with output_to(Path("record.log")) as terminal:
        record_pusht(...)                       # encoder settings, warnings, tracebacks: in the log
        print("20 episodes", file=terminal)     # on the terminal

It works on file descriptors, so it catches C libraries (the AV1 encoder) and child processes as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_STDOUT, _STDERR = 1, 2


@contextmanager
def output_to(log_path: Path) -> Iterator[TextIO]:
    """Append standard output and standard error of this whole process, all threads, to `log_path`.

    Yields:
        A stream to where standard output went before, a terminal if that was one (`tqdm(file=…)` works).

    An exception that leaves the block carries a note that names the log.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    _flush()
    with (
        open(log_path, "ab", buffering=0) as log,
        _saved(_STDOUT) as stdout,
        _saved(_STDERR),
        open(os.dup(stdout), "w", buffering=1, encoding=encoding, errors="replace") as terminal,
    ):
        os.dup2(log.fileno(), _STDOUT)
        os.dup2(log.fileno(), _STDERR)
        try:
            yield terminal
        except BaseException as error:
            error.add_note(f"The full output is in {log_path}")
            raise
        finally:
            _flush()  # what was printed inside the block still belongs to the log


@contextmanager
def _saved(descriptor: int) -> Iterator[int]:
    """Put the descriptor back at the end; yields a copy of what it was."""
    copy = os.dup(descriptor)
    try:
        yield copy
    finally:
        os.dup2(copy, descriptor)
        os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
