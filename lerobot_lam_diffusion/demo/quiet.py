"""Record LeRobot datasets without what the AV1 encoder, FFmpeg and `datasets` print of each episode."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextmanager
def quiet_recording() -> Iterator[TextIO]:
    """Standard error of the whole process, C libraries included, goes nowhere; exceptions are raised as ever.

    Yields:
        What standard error was before: a progress bar may be written there meanwhile.
    """
    bars_were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    sys.stderr.flush()
    stderr = os.dup(2)
    silenced = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silenced, 2)
    os.close(silenced)
    try:
        with os.fdopen(os.dup(stderr), "w") as terminal:
            yield terminal
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        if not bars_were_disabled:
            enable_progress_bars()
