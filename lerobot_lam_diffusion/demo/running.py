"""Run a command with its output in a log and one line of progress on the console.

with LiveLine(sys.stdout) as line:
    run_logged(["lerobot-train", ...], Path("train.log"), training_progress, line)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TextIO

from lerobot_lam_diffusion.scripts.next_step import shell_text
from lerobot_lam_diffusion.utils.errors import DemoError

_POLL_SECONDS = 0.25
_LOG_TAIL = 12  # lines shown of a command that failed
_BAR = 24  # characters

# LeRobot's tracker after each step, and tqdm's counter of our extraction.
_LOSS = re.compile(r"\bstep:\S+ .*?\bloss:(\S+)")
_TOKENS = re.compile(r"LAM tokens:.*?\| *(\d+)/(\d+) ")
_TRAINED = re.compile(r"Training:.*?\| *(\d+)/(\d+) ")


class Progress(NamedTuple):
    done: int
    total: int
    note: str


def run_logged(
    argv: Sequence[str], log: Path, progress_of: Callable[[str], Progress | None], line: LiveLine
) -> None:
    """Run a command offline to its end, output appended to `log`; `progress_of` reads the log so far.

    Raises:
        DemoError: it is not installed, or failed; with the last lines of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = command_environment()
    program = shutil.which(argv[0], path=environment["PATH"])
    if program is None:
        raise DemoError(
            f"{argv[0]} is not beside {sys.executable} nor on the PATH; it belongs to this installation. "
            "Install the package again into this environment"
        )
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                line.show(progress_of(log.read_text("utf-8", errors="replace")))
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
                process.wait()
    if process.returncode != 0:
        tail = "\n".join(
            f"  | {text}" for text in log.read_text("utf-8", errors="replace").splitlines()[-_LOG_TAIL:]
        )
        raise DemoError(
            f"this command ended with status {process.returncode}; its full output is in {log}:\n"
            f"{shell_text(argv)}\n{tail}"
        )


def command_environment() -> dict[str, str]:
    """Environment variables: offline, with this environment's commands first on PATH, activated or not.

    The commands' output, which goes only to the log, is UTF-8 whatever the terminal's encoding is.
    PyTorch's waiting threads sleep instead of spinning, which does not change the results. On two cores, one
    of them otherwise busy, a ResNet-18 step took 0.84 s this way and 1.42 s without (means of 3 runs).
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    fixed = {"HF_HUB_OFFLINE": "1", "PATH": path, "PYTHONIOENCODING": "utf-8"}
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **fixed}


def losses(log: str) -> list[float]:
    """The loss of each step that `lerobot-train --log_freq=1` has logged."""
    return [float(loss) for loss in _LOSS.findall(log)]


def training_progress(log: str) -> Progress | None:
    counts = _TRAINED.findall(log)
    if not counts:
        return None
    found = losses(log)
    note = f"steps   loss {found[-1]:.3f}" if found else "steps"
    return Progress(int(counts[-1][0]), int(counts[-1][1]), note)


def token_progress(log: str) -> Progress | None:
    counts = _TOKENS.findall(log)
    return Progress(int(counts[-1][0]), int(counts[-1][1]), "frames") if counts else None


class LiveLine:
    """Progress of one step: one line rewritten in place on a terminal, a line a quarter elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._started = time.perf_counter()
        self._printed = 0  # quarters, where the stream is no terminal

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def show(self, progress: Progress | None) -> None:
        """Show the progress; None: there is none to show yet."""
        if self._is_terminal:
            self._stream.write(f"\r\033[K  {self._text(progress)}")
            self._stream.flush()
            return
        quarter = 4 * progress.done // max(progress.total, 1) if progress else 0
        if quarter > self._printed:
            self._printed = quarter
            print(f"  {self._text(progress)}", file=self._stream, flush=True)

    def _text(self, progress: Progress | None) -> str:
        if progress is None:
            return f"starting ... {self.seconds:.0f} s"
        filled = _BAR * progress.done // max(progress.total, 1)
        bar = "#" * filled + "-" * (_BAR - filled)
        return f"[{bar}] {progress.done}/{progress.total} {progress.note}   {self.seconds:.0f} s"
