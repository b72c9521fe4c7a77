"""Record LeRobot datasets without a page of the encoder's settings and a progress bar for each episode."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextmanager
def quiet_recording() -> Iterator[None]:
    """Only errors of the AV1 encoder are printed, and no bars of `datasets`; afterwards all is as before."""
    svt_log, bars_were_disabled = os.environ.get("SVT_LOG"), are_progress_bars_disabled()
    os.environ["SVT_LOG"] = "1"
    disable_progress_bars()
    try:
        yield
    finally:
        if not bars_were_disabled:
            enable_progress_bars()
        if svt_log is None:
            del os.environ["SVT_LOG"]
        else:
            os.environ["SVT_LOG"] = svt_log
