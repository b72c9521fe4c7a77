"""How long commands that only read token stores take, next to `import torch`, which a store needs.

    python -m tests.benchmarks.quick_answers

Each is a process of its own; CPU seconds (user and system), the median of `--rounds` after one that warms the
file cache. "import LeRobot's datasets" is what they would take with LeRobot.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from tests.conftest import TOP, record_dataset

TORCH = "import torch"
COMMAND = "import sys, lerobot_lam_commands; lerobot_lam_commands.tokens(sys.argv[1:])"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def cpu_seconds(*words: str) -> float:
    """Of a Python process with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_LEROBOT_HOME"] = f"{folder}/home"
        dataset = record_dataset(Path(folder) / "data", lengths=(40, 40))
        store = f"{folder}/store"
        lam = load_lam("pusht-compact")
        precompute_tokens(dataset, lam, Path(store), camera_key=TOP, lam_path="pusht-compact")
        processes = {
            TORCH: ["-c", TORCH],
            "info": ["-c", COMMAND, "info", store],
            "verify": ["-c", COMMAND, "verify", store],
            "export": ["-c", COMMAND, "export", store, "--format=npy"],
            "cache list": ["-c", COMMAND, "cache", "list"],
            "import LeRobot's datasets": ["-c", "import torch, lerobot.datasets"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in processes}
        for turn in range(args.rounds + 1):
            for name, words in processes.items():
                output = [f"--output={folder}/{turn}.npy"] if name == "export" else []
                spent = cpu_seconds(*words, *output)
                if turn:
                    seconds[name].append(spent)
    base = statistics.median(seconds[TORCH])
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"{name:<26}{median:>7.2f} s{median / base:>7.2f} x {TORCH}")


if __name__ == "__main__":
    main()
