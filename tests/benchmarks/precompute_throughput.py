"""How fast extraction is: a naive loop, ours, and the limits it cannot pass, in one run on one dataset.

    python tests/benchmarks/precompute_throughput.py --height=480 --width=640 --lam_path=pusht-compact
    python tests/benchmarks/precompute_throughput.py --height=96 --width=96 --lam_path=pusht-compact
    python tests/benchmarks/precompute_throughput.py --family=villa_x --max_pairs=16 --batch_size=4 --rounds=1
    python tests/benchmarks/precompute_throughput.py --device=cuda --family=lapa --dtype=bfloat16

"naive" is the loop that one writes first: `dataset[i - 1]`, `dataset[i]` of a dataset opened as LeRobot opens
it, the LAM called on a stacked batch. "ours" is `precompute_tokens`. "decode alone" reads every frame once,
in order, with as many threads as "ours" uses; "resize alone" brings decoded frames to the LAM's size, with as
many; "LAM alone" encodes ready batches. On a CPU all three share the cores, so besides the slowest the table
tells what is left when the same cores do them all: 1 / (1/decode + 1/resize + 1/LAM).
The pictures are smooth noise that moves; with `--clip`, the frames of a recording. Rounds alternate; medians.
"""

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SVT_LOG", "1")

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.demo.quiet import quiet_recording
from lerobot_lam_diffusion.lam import LatentActionModel, load_lam, write_lam
from lerobot_lam_diffusion.lam.lapa import LapaLam
from lerobot_lam_diffusion.lam.preprocess import as_uint8
from lerobot_lam_diffusion.lam.univla import UniVlaLam
from lerobot_lam_diffusion.lam.villa_x import VillaXLam
from lerobot_lam_diffusion.precompute.encode import find_batch_size
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.precompute.frames import EpisodeFrames
from lerobot_lam_diffusion.precompute.parallel import work_ahead

CAMERA = "observation.images.top"
GFLOP_PER_PAIR = {"villa_x": 122.3, "lapa": 52.9, "univla": 214.5}  # of the published sizes
FAMILIES: dict[str, type[LatentActionModel]] = {"villa_x": VillaXLam, "lapa": LapaLam, "univla": UniVlaLam}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--episode_frames", type=int, default=100)
    parser.add_argument(
        "--clip", type=Path, help="an animated picture file whose frames are recorded instead"
    )
    parser.add_argument("--lam_path", default="pusht-compact")
    parser.add_argument(
        "--family", choices=FAMILIES, help="a LAM of the published size of that family, random weights"
    )
    parser.add_argument("--villa_x", dest="family", action="store_const", const="villa_x")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the LAM")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch_size", type=int, help="of ours; found out if left out")
    parser.add_argument("--workers", type=int, help="decoding threads; the number of cores if left out")
    parser.add_argument("--backend", default="pyav", choices=["pyav", "torchcodec"], help="of both sides")
    parser.add_argument("--max_pairs", type=int, help="encode only so many pairs (a slow LAM on a CPU)")
    parser.add_argument(
        "--naive_pairs", type=int, default=128, help="of the naive loop, spread over the data"
    )
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def record(root: Path, args: argparse.Namespace) -> LeRobotDataset:
    """Encoded as LeRobot encodes a recording."""
    image = {
        "dtype": "video",
        "shape": (args.height, args.width, 3),
        "names": ["height", "width", "channels"],
    }
    vector = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    features = {"observation.state": vector, "action": vector, CAMERA: image}
    created = LeRobotDataset.create("local/x", args.fps, features, root=root, video_backend=args.backend)
    numbers = {"observation.state": np.zeros(2, "float32"), "action": np.zeros(2, "float32"), "task": "move"}
    for episode in range(args.episodes):
        pictures = _clip(args) if args.clip else [_smooth_noise(args, episode)]
        for step in range(args.episode_frames):
            shift = (episode * 5, 0) if args.clip else (step * 2, step)
            created.add_frame({CAMERA: np.roll(pictures[step % len(pictures)], shift, (0, 1)), **numbers})
        created.save_episode()
    created.finalize()
    episodes = None if args.max_pairs is None else [0]
    return LeRobotDataset(
        "local/x", root=root, episodes=episodes, video_backend=args.backend, return_uint8=True
    )


def _smooth_noise(args: argparse.Namespace, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 12, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (args.height, args.width), mode="bicubic")
    grain = 0.05 * torch.rand(3, args.height, args.width, generator=generator)
    return ((smooth[0] + grain).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()


def _clip(args: argparse.Namespace) -> list[np.ndarray]:
    from PIL import Image, ImageSequence

    frames = ImageSequence.Iterator(Image.open(args.clip))
    return [np.asarray(frame.convert("RGB").resize((args.width, args.height))) for frame in frames]


def write_random(folder: Path, family: type[LatentActionModel]) -> None:
    """A model of the family's default dimensions."""
    config = family.config_class()
    modules = family.build_modules(config)
    for parameter in (each for module in modules.values() for each in module.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    state = {
        f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()
    }
    write_lam(folder, family, config, state)


def naive(dataset: LeRobotDataset, lam, num_pairs: int, batch_size: int) -> float:
    """Pairs a second of random access and plain batches."""
    dataset = LeRobotDataset(
        dataset.repo_id, root=dataset.root, episodes=dataset.episodes, video_backend=dataset._video_backend
    )
    step = max(1, (len(dataset) - 1) // num_pairs)
    frames = list(range(1, len(dataset), step))[:num_pairs]
    started = time.perf_counter()
    for first in range(0, len(frames), batch_size):
        some = frames[first : first + batch_size]
        prev = torch.stack([dataset[i - 1][CAMERA] for i in some]).to(lam.device)
        cur = torch.stack([dataset[i][CAMERA] for i in some]).to(lam.device)
        lam.encode_pairs(as_uint8(prev), as_uint8(cur)).continuous.cpu()
    return len(frames) / (time.perf_counter() - started)


def decode_alone(dataset: LeRobotDataset, workers: int) -> float:
    """Frames a second."""
    episodes = dataset.episodes or range(dataset.meta.total_episodes)
    started = time.perf_counter()
    make = lambda: EpisodeFrames(dataset, CAMERA).chunks  # noqa: E731
    count = sum(len(chunk) for chunk in work_ahead(episodes, make, workers, 2 * workers))
    return count / (time.perf_counter() - started)


def resize_alone(dataset: LeRobotDataset, lam, workers: int) -> float:
    """Frames a second, of one chunk again and again."""
    chunk = next(EpisodeFrames(dataset, CAMERA).chunks(0))
    started = time.perf_counter()
    tasks, make = range(2 * max(1, workers)), lambda: lambda _: [lam.resize(chunk)]
    count = sum(len(small) for small in work_ahead(tasks, make, workers, 2 * max(1, workers)))
    return count / (time.perf_counter() - started)


def lam_alone(lam, batch_size: int, at_least_s: float = 2.0) -> float:
    """Pairs a second on ready batches at the LAM's own size, with as many threads as extraction uses."""
    noise = torch.randint(0, 256, (2 * batch_size, 3, 64, 64), dtype=torch.uint8)
    prev, cur = lam.resize(noise).chunk(2)
    threads = len(os.sched_getaffinity(0)) if lam.device.type == "cpu" else 1
    started = time.perf_counter()
    tasks = itertools.takewhile(lambda _: time.perf_counter() - started < at_least_s, itertools.count())
    encode = lambda _: [lam.encode_pairs(prev, cur).continuous.cpu()]  # noqa: E731
    batches = sum(1 for _ in work_ahead(tasks, lambda: encode, threads, threads))
    return batches * batch_size / (time.perf_counter() - started)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product here."""
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        float((a @ b)[0, 0])
        rates.append(2 * size**3 / (time.perf_counter() - started) / 1e12)
    return statistics.median(rates[1:])


def main() -> None:
    args = arguments()
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, 16) if args.workers is None else args.workers
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        with quiet_recording():
            dataset = record(work_dir / "data", args)
        if args.family:
            write_random(work_dir / "lam", FAMILIES[args.family])
        lam = load_lam(
            work_dir / "lam" if args.family else args.lam_path,
            device=args.device,
            dtype=getattr(torch, args.dtype),
        )
        if args.compile:
            lam.compile()
        batch_size = args.batch_size or find_batch_size(lam, len(dataset))
        lam_alone(lam, batch_size, 0.1)  # compile, warm up
        rates: dict[str, list[float]] = {
            name: [] for name in ("naive", "ours", "decode alone", "resize alone", "LAM alone")
        }
        waited = []
        for _ in range(args.rounds):
            naive_pairs = min(args.naive_pairs, args.max_pairs or args.naive_pairs)
            rates["naive"].append(naive(dataset, lam, naive_pairs, min(batch_size, naive_pairs)))
            rates["decode alone"].append(decode_alone(dataset, workers))
            rates["resize alone"].append(resize_alone(dataset, lam, workers))
            rates["LAM alone"].append(lam_alone(lam, batch_size))
            summary = precompute_tokens(
                dataset, lam, work_dir / "store", camera_key=CAMERA, lam_path="x", batch_size=batch_size,
                num_workers=workers, show_progress=False,
            )  # fmt: skip
            rates["ours"].append(summary.encoded / summary.seconds)
            waited.append(summary.waited / summary.seconds)
            shutil.rmtree(work_dir / "store")
        tell(args, rates, waited, batch_size, workers, cores)


def tell(args, rates, waited, batch_size: int, workers: int, cores: int) -> None:
    median = {name: statistics.median(values) for name, values in rates.items()}
    what = f"{args.family} at its published size" if args.family else args.lam_path
    print(
        f"\n{args.height} x {args.width}, {args.backend}, {what} in {args.dtype} on {args.device}, "
        f"batch {batch_size}, {workers} decoding threads, {cores} cores, {args.rounds} rounds"
    )
    for name, value in median.items():
        print(f"{name:<24}{value:>10.1f} pairs/s{median['ours'] / value:>10.2f} x = ours / this")
    limits = [value for name, value in median.items() if name.endswith("alone")]
    slowest, together = min(limits), 1 / sum(1 / value for value in limits)
    print(f"{'the slowest limit':<24}{slowest:>10.1f} pairs/s{median['ours'] / slowest:>10.2f} x")
    print(f"{'all on the same cores':<24}{together:>10.1f} pairs/s{median['ours'] / together:>10.2f} x")
    print(f"of ours' wall time: {statistics.median(waited):.0%} waiting for frames")
    print(
        f"a million frames: {1e6 / median['ours'] / 3600:.2f} h; naive {1e6 / median['naive'] / 3600:.1f} h"
    )
    if args.family:
        used = median["LAM alone"] * GFLOP_PER_PAIR[args.family] / 1e3
        best = matrix_rate(args.device, getattr(torch, args.dtype))
        print(f"encoder: {used:.2f} TFLOP/s of {best:.2f} of a matrix product here ({used / best:.0%})")


if __name__ == "__main__":
    main()
