"""A policy that is built with `auto` in a process of its own; by a fork server, as `interrupted.py`."""

import logging
import os
import signal
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.cache import CacheEntry
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.utils.files import locked
from tests.conftest import TOP
from tests.precompute.interrupted import on_writes

NAME = "top-vq-stride1-0123456789abcdef"


def entry_in(cache: Path) -> CacheEntry:
    return CacheEntry(cache, NAME)


def open_cached(cache: Path, root: Path, lam_folder: Path, told: Path | None = None, slow: float = 0.0):
    """Open the store, or build it; each build and each log line leaves a line in `told`."""
    dataset = LeRobotDataset("local/squares", root=root, video_backend="pyav")

    def note(line: str) -> None:
        if told is not None:
            with told.open("a") as file:
                file.write(f"{os.getpid()} {line}\n")

    def build(folder: Path) -> None:
        note("builds")
        time.sleep(slow)
        summary = precompute_tokens(
            dataset, load_lam(lam_folder), folder, camera_key=TOP, lam_path=str(lam_folder), batch_size=8,
            shard_frames=1, num_workers=1, show_progress=False,
        )  # fmt: skip
        note(f"built {summary.encoded}")

    handler = logging.Handler()
    handler.emit = lambda record: note(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("lerobot_lam_diffusion.utils.files")
    log.setLevel("INFO")
    log.addHandler(handler)
    try:
        store = entry_in(cache).open(dataset.meta, build)
    finally:
        log.removeHandler(handler)
    note(f"opened {len(store.values)}")
    return store


def die_at_write(kill_at: int, cache: Path, root: Path, lam_folder: Path, told: Path) -> None:
    """A training that is killed before its `kill_at`-th change to a file below the cache."""
    on_writes(cache, lambda k: k == kill_at and os.kill(os.getpid(), signal.SIGKILL))
    open_cached(cache, root, lam_folder, told)
    sys.exit(0)


def hold(cache: Path, holding, let_go) -> None:
    """A process that builds until it is told to stop."""
    with locked(entry_in(cache)._lock_file, wait=True):
        holding.set()
        let_go.wait(60)
