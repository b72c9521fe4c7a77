"""Tasks of `test_cluster.py` that die; engines find them by name, in processes of their own."""

import os
import signal
from pathlib import Path

from lerobot_lam_diffusion.scripts.precompute_lam_tokens import extract_share
from tests.precompute.interrupted import on_writes

DIES = f"{__name__}:dies_once"
DIES_WITH_ITS_NODE = f"{__name__}:dies_once_with_its_node"


def dies_once(flags: dict, rank: int, tasks: int, cpus: int, and_parent: bool = False) -> int:
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
    return extract_share(flags, rank, tasks, cpus)


def dies_once_with_its_node(flags: dict, rank: int, tasks: int, cpus: int) -> int:
    """The same, and with it the process of the engine that waits for it."""
    return dies_once(flags, rank, tasks, cpus, and_parent=True)
