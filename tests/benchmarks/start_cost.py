"""What knowing a dataset by its frames costs at the start of a training, next to opening that dataset.

    python -m tests.benchmarks.start_cost
    python -m tests.benchmarks.start_cost --episodes=1000

A recording of 100 episodes is put together as often as needed with LeRobot's `aggregate_datasets`. "open" is
LeRobot's own reading of the metadata. "digest, first" reads the dataset's files, as the first process on a
machine does; "digest" finds what that has noted, as every later process does; "check" compares the metadata's
tables with one another. Each but the first digest is the median of `--rounds`.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_HOME = tempfile.TemporaryDirectory(prefix="lerobot-home-")
os.environ["HF_LEROBOT_HOME"] = _HOME.name  # where a process notes what it has read

from lerobot.datasets.aggregate import aggregate_datasets
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

from lerobot_lam_diffusion.tokens.dataset_check import check_metadata
from lerobot_lam_diffusion.tokens.frames_digest import frames_digest
from tests.conftest import TOP, record_dataset

PART = 100


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=10_000, help=f"rounded up to {PART}s")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        part, whole = Path(folder) / "part", Path(folder) / "whole"
        record_dataset(part, lengths=(4,) * PART)
        count = -(-args.episodes // PART)
        aggregate_datasets(["local/squares"] * count, "local/whole", [part] * count, whole)

        def opened() -> LeRobotDatasetMetadata:
            return LeRobotDatasetMetadata("local/whole", root=whole)

        meta = opened()
        costs = {
            "open": median(opened, args.rounds),
            "digest, first": seconds(lambda: frames_digest(meta, TOP)),
            "digest": median(lambda: frames_digest(meta, TOP), args.rounds),
            "check": median(lambda: check_metadata(meta), args.rounds),
        }
        size = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
        print(f"{meta.total_episodes:,} episodes, {meta.total_frames:,} frames, {size / 1e6:,.0f} MB")
        for name, cost in costs.items():
            print(f"{name:<14}{cost * 1e3:>9.1f} ms{cost / costs['open']:>8.2f} x open")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median(call: Callable[[], object], rounds: int) -> float:
    return statistics.median(seconds(call) for _ in range(rounds))


if __name__ == "__main__":
    main()
