"""What a store of millions of frames costs to write, open and join: time, memory, disk.

    python tests/benchmarks/token_store.py
    python tests/benchmarks/token_store.py --frames=100000000 --episodes=500000 --kinds vq

Synthetic tokens of 2 slots of 32 numbers, written by the store's own writer into a temporary folder that is
removed afterwards (2.6 GB at most by default). "first open" reads everything, as the first process on a
machine does that did not write the store; "open" finds the stamp of that, as every later one does; both with
what this process remembers cleared, and without the 20 s of importing LeRobot. "join" is `window` of 64
random frames at the offsets -1 and 0: cold with the file's pages dropped from the page cache, so that it is
the disk's speed; warm the median of 200 of them. RSS is what resident memory grows by at most (Linux).
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_HOME = tempfile.TemporaryDirectory(prefix="lerobot-home-")
os.environ["HF_LEROBOT_HOME"] = _HOME.name  # the stamps of these stores are nobody's business

import torch

from lerobot_lam_diffusion.tokens import Provenance, TokenStore, checked
from lerobot_lam_diffusion.tokens.layout import TENSORS_FILE
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS, VQ, DatasetInfo, LamInfo
from lerobot_lam_diffusion.tokens.writer import write_store

KINDS = ("vq", "float32", "float16", "bfloat16", "int8")
SLOTS, WIDTH, NUM_CODES = 2, 32, 32
BATCH, DELTAS = 64, (-1, 0)
BLOCK_ROWS = 1 << 14


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=10_000_000)
    parser.add_argument("--episodes", type=int, default=50_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--work_dir", type=Path, help="where the temporary folder is made")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    print(f"{args.frames:,} frames in {args.episodes:,} episodes, {torch.get_num_threads()} threads")
    print(
        f"{'':<10}{'B/frame':>8}{'max error':>11}{'write':>11}{'first open':>12}{'open':>9}{'RSS open':>10}"
        f"{'RSS first':>11}{'RSS write':>11}{'join cold':>11}{'join warm':>11}"
    )
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
            measure(kind, Path(folder) / "store", args.frames, args.episodes)


def measure(kind: str, folder: Path, frames: int, episodes: int) -> None:
    bounds = torch.linspace(0, frames, episodes + 1, dtype=torch.float64).long()
    codebook = torch.randn(NUM_CODES, WIDTH, generator=torch.Generator().manual_seed(0))
    spent = [0.0]
    list(zip(range(3), blocks(kind, frames, [0.0]), strict=False))  # warm up
    before = Memory()
    started = time.perf_counter()
    write_store(
        folder,
        provenance_of(kind, frames, episodes),
        blocks(kind, frames, spent),
        codebook,
        bounds[:-1].clone(),
        bounds[1:].clone(),
        torch.ones(episodes, dtype=torch.bool),
    )
    write_s = time.perf_counter() - started - spent[0]
    write_memory = before.grown_at_most()
    num_bytes = (folder / TENSORS_FILE).stat().st_size

    for stamp in Path(_HOME.name).rglob("checked/*"):
        stamp.unlink()
    first_s, first_memory, _ = opened(folder)
    open_s, open_memory, store = opened(folder)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(frames, (BATCH,), generator=generator) for _ in range(200)]
    drop_pages(folder / TENSORS_FILE)
    cold_s = seconds_of_join(store, batches[0])
    for batch in batches:
        seconds_of_join(store, batch)
    warm_s = [seconds_of_join(store, batch) for batch in batches]
    assert store.provenance is not None
    print(
        f"{kind:<10}{num_bytes / frames:>8.1f}{store.provenance.max_error:>11.2g}"
        f"{num_bytes / write_s / 1e6:>6.0f} MB/s{first_s:>10.2f} s{open_s * 1e3:>6.1f} ms"
        f"{open_memory:>7.1f} MB{first_memory:>8.1f} MB{write_memory:>8.1f} MB"
        f"{cold_s * 1e3:>8.2f} ms{statistics.median(warm_s) * 1e3:>8.3f} ms",
        flush=True,
    )


def blocks(kind: str, frames: int, spent: list[float]) -> Iterator[torch.Tensor]:
    """Random rows; the time that making them takes is added to `spent[0]`."""
    generator = torch.Generator().manual_seed(2)
    for start in range(0, frames, BLOCK_ROWS):
        started = time.perf_counter()
        rows = min(BLOCK_ROWS, frames - start)
        if kind == "vq":
            block = torch.randint(NUM_CODES, (rows, SLOTS), generator=generator)
        else:
            block = torch.randn(rows, SLOTS * WIDTH, generator=generator)
        spent[0] += time.perf_counter() - started
        yield block


def provenance_of(kind: str, frames: int, episodes: int) -> Provenance:
    return Provenance(
        dataset=DatasetInfo("local/synthetic", None, frames, episodes, 30, "digest"),
        lam=LamInfo("synthetic", None, "fingerprint", SLOTS, WIDTH, NUM_CODES, 1.0),
        camera_key="observation.image",
        frame_stride=1,
        stride_seconds=1 / 30,
        token_kind=VQ if kind == "vq" else CONTINUOUS,
        dtype="float32",
        versions={},
        storage_dtype="" if kind == "vq" else kind,
    )


def opened(folder: Path) -> tuple[float, float, TokenStore]:
    """Seconds and resident memory that opening takes in a process that knows nothing of the store."""
    checked._noted.clear()
    before = Memory()
    started = time.perf_counter()
    store = TokenStore.open(folder)
    return time.perf_counter() - started, before.grown_at_most(), store


def seconds_of_join(store: TokenStore, index: torch.Tensor) -> float:
    started = time.perf_counter()
    store.window(index, DELTAS)
    return time.perf_counter() - started


def drop_pages(path: Path) -> None:
    """Have the kernel forget a file that no longer has to be written; mapped pages may stay."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


class Memory:
    """Resident memory of this process from now on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        self._before = self._read("VmRSS")

    def grown_at_most(self) -> float:
        """MB between the start and the peak since then."""
        return (self._read("VmHWM") - self._before) / 1024

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
