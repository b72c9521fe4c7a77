"""An extraction in a process of its own, for tests that stop it; by a fork server, so it costs no import."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.precompute.processes import Process
from lerobot_lam_diffusion.scripts.precompute_lam_tokens import main
from tests.conftest import TOP

WRITES = ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def extract(root: Path, lam_folder: Path, output_dir: Path, **options):
    """The extraction of these tests: five shards of an episode each."""
    dataset = LeRobotDataset("local/squares", root=root, video_backend="pyav")
    return precompute_tokens(
        dataset,
        load_lam(lam_folder),
        output_dir,
        camera_key=TOP,
        lam_path="a/lam",
        show_progress=False,
        **{"batch_size": 8, "shard_frames": 1, "num_workers": 1, **options},
    )


def on_writes(below: Path, act: Callable[[int], object]) -> None:
    """Call `act(k)` before the k-th change that this process makes to a file below a folder."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in WRITES or not str(arguments[0]).startswith(str(below)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        act(count)

    sys.addaudithook(hook)


def count_writes(results, root: Path, lam_folder: Path, output_dir: Path, options: dict) -> None:
    """An undisturbed run; tells how many changes to files it makes."""
    counts = [0]
    on_writes(output_dir.parent, counts.append)
    extract(root, lam_folder, output_dir, **options)
    results.put(counts[-1])


def die_at_write(kill_at: int, root: Path, lam_folder: Path, output_dir: Path, options: dict) -> None:
    """A run that is killed before its `kill_at`-th change to a file."""
    on_writes(output_dir.parent, lambda k: k == kill_at and os.kill(os.getpid(), signal.SIGKILL))
    extract(root, lam_folder, output_dir, **options)


def run_as(
    rank: int, world_size: int, kill_at: int, root: Path, lam: Path, output_dir: Path, port: int
) -> None:
    """One process of a launch, as `torchrun` starts them; killed before its `kill_at`-th write if not 0."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    if kill_at:
        on_writes(output_dir.parent, lambda k: k == kill_at and os.kill(os.getpid(), signal.SIGKILL))
    extract(root, lam, output_dir, process=Process.launched("cpu"))


def command_stopped_by(number: int, at_write: int, argv: list[str], told: Path) -> None:
    """`lerobot-lam-precompute`, which gets a signal at a write; its stderr goes to a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    output_dir = next(Path(word.split("=")[1]) for word in argv if word.startswith("--output_dir="))
    on_writes(output_dir.parent, lambda k: k == at_write and os.kill(os.getpid(), number))
    with told.open("w") as stderr:
        sys.stderr = stderr
        try:
            main(argv)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                stderr.write(stop.code)
            stderr.flush()
            os._exit(1 if isinstance(stop.code, str) else stop.code or 0)
