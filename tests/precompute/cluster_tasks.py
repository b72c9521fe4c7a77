"""Tasks of `test_cluster.py` that die; engines import them in processes of their own."""

import os
import signal
from pathlib import Path

from lerobot_lam_diffusion.scripts.precompute_lam_tokens import extract_share
from tests.precompute.interrupted import on_writes


def dies_once(flags: dict, cpus: int, data, rank: int, world_size: int, and_parent: bool = False) -> None:
    """`extract_share`; the first time, task 1 is killed as its first shard is about to be finished."""
    folder = Path(flags["output_dir"]).parent
    died = folder / "died"

    def kill(_write: int) -> None:
        died.touch()
        if and_parent:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1 and not died.exists():
        on_writes(Path(f"{flags['output_dir']}.shards"), lambda k: k == 4 and kill(k))
    extract_share(flags, cpus, data, rank, world_size)


def dies_once_with_its_node(flags: dict, cpus: int, data, rank: int, world_size: int) -> None:
    """The same, and with it the process of the engine that waits for it."""
    dies_once(flags, cpus, data, rank, world_size, and_parent=True)
