"""What LAM conditioning costs a training step: stock, precomputed and on the fly, on the same batches.

    python tests/benchmarks/training_step.py --device=cpu --batch_size=8 --rounds=9
    python tests/benchmarks/training_step.py --device=cuda --batch_size=64 --dtype=bfloat16 --villa_x \\
        --no-small

Every round runs one step of each variant in turn, so that a machine's drift hits all alike; medians and the
ratio to stock, round by round, are printed. "step" is forward, backward and optimizer on a ready batch; "LAM"
is the LAM's own forward pass on that batch, the least that tokens on the fly can cost; "+ loader" adds
decoding, collation and pre-processing in the same process. Peak memory is that of a fresh process for each
variant: the CUDA allocator's, or the resident set on a CPU (Linux).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.factory import make_policy, make_pre_post_processors

from lerobot_lam_diffusion import OBS_LAM_IMAGES, DiffusionLamConfig
from lerobot_lam_diffusion.demo.record import IMAGE_KEY, record_pusht
from lerobot_lam_diffusion.lam import LamConfig, load_lam, save_lam
from lerobot_lam_diffusion.lam.preprocess import as_uint8
from lerobot_lam_diffusion.lam.quantizer import Quantizer
from lerobot_lam_diffusion.lam.villa_x.decoder import Decoder
from lerobot_lam_diffusion.lam.villa_x.encoder import Encoder
from lerobot_lam_diffusion.precompute.engine import precompute_tokens

VARIANTS = ("stock", "precomputed", "on the fly, compact", "on the fly, villa-X size")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the LAM")
    parser.add_argument("--lam_path", default="pusht-compact")
    parser.add_argument(
        "--villa_x", action="store_true", help="also the default villa-X size, random weights"
    )
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, default=True, help="a small U-Net")
    parser.add_argument("--work_dir", type=Path, help="keeps the dataset and store between runs")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(work_dir: Path, args: argparse.Namespace) -> None:
    """A recorded PushT dataset, its tokens and, if asked for, a LAM of villa-X's default size."""
    if not (work_dir / "pusht").exists():
        record_pusht(work_dir / "pusht", "local/pusht", 4, near_goal=True)
    if not (work_dir / "tokens").exists():
        dataset = LeRobotDataset(
            "local/pusht", root=work_dir / "pusht", video_backend="pyav", return_uint8=True
        )
        lam = load_lam(args.lam_path)
        precompute_tokens(dataset, lam, work_dir / "tokens", camera_key=IMAGE_KEY, lam_path=args.lam_path)
    if args.villa_x and not (work_dir / "villa_x").exists():
        config = LamConfig()
        save_lam(work_dir / "villa_x", config, Encoder(config), Quantizer(config), Decoder(config))


class Variant:
    """One policy with its optimizer and its stream of batches."""

    def __init__(self, name: str, work_dir: Path, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        fields = {"device": args.device, "pretrained_backbone_weights": None, "push_to_hub": False}
        if args.small:
            fields |= {"down_dims": (64, 128), "horizon": 16, "n_action_steps": 8}
        live = {"lam_camera_key": IMAGE_KEY, "lam_dtype": args.dtype}
        if name == "stock":
            config = DiffusionConfig(**fields)
        elif name == "precomputed":
            tokens = str(work_dir / "tokens")
            config = DiffusionLamConfig(**fields, use_precomputed_lam_tokens=True, lam_tokens_path=tokens)
        elif name == "on the fly, compact":
            config = DiffusionLamConfig(**fields, **live, lam_model_path=args.lam_path)
        else:
            config = DiffusionLamConfig(**fields, **live, lam_model_path=str(work_dir / "villa_x"))
        root = work_dir / "pusht"
        meta = LeRobotDataset("local/pusht", root=root, video_backend="pyav").meta
        torch.manual_seed(0)
        self.policy = make_policy(config, ds_meta=meta).train()
        self.preprocess, _ = make_pre_post_processors(config, dataset_stats=meta.stats)
        self.optimizer = torch.optim.AdamW(self.policy.get_optim_params(), lr=1e-4)
        deltas = resolve_delta_timestamps(config, meta)
        dataset = LeRobotDataset("local/pusht", root=root, delta_timestamps=deltas, video_backend="pyav")
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        self.batches = torch.utils.data.DataLoader(
            dataset, batch_size=args.batch_size, sampler=order, drop_last=True
        )
        self.stream = iter(self.batches)

    def load(self) -> dict:
        try:
            batch = next(self.stream)
        except StopIteration:
            self.stream = iter(self.batches)
            batch = next(self.stream)
        return self.preprocess(batch)

    def encode(self, batch: dict) -> None:
        """The LAM alone, on the pairs of this batch."""
        frames = as_uint8(batch[OBS_LAM_IMAGES][IMAGE_KEY])
        self.policy.live_tokens.lams[0].encode(frames[:, -2], frames[:, -1])
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, batch: dict) -> None:
        loss, _ = self.policy.forward(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()


def measure(args: argparse.Namespace, work_dir: Path, names: list[str]) -> None:
    variants = {name: Variant(name, work_dir, args) for name in names}
    for variant in variants.values():
        variant.step(variant.load())  # warm up
    steps: dict[str, list[float]] = {name: [] for name in names}
    whole: dict[str, list[float]] = {name: [] for name in names}
    lam: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            batch = variant.load()
            loaded = time.perf_counter()
            variant.step(batch)
            end = time.perf_counter()
            steps[name].append(end - loaded)
            whole[name].append(end - start)
            if name.startswith("on the fly"):
                variant.encode(batch)
                lam[name].append(time.perf_counter() - end)
    print(f"\n{args.device}, batch {args.batch_size}, {args.rounds} rounds, LAM in {args.dtype}")
    heads = f"{'step ms':>10}{'x stock':>9}{'LAM ms':>9}{'+ loader ms':>13}{'x stock':>9}{'peak MB':>9}"
    print(f"{'variant':<28}{heads}")
    for name in names:
        cells = [statistics.median(steps[name]) * 1000, _ratio(steps, name)]
        cells += [statistics.median(lam[name] or [0.0]) * 1000]
        cells += [
            statistics.median(whole[name]) * 1000,
            _ratio(whole, name),
            _peak_megabytes(name, work_dir, args),
        ]
        print("{:<28}{:>10.1f}{:>9.3f}{:>9.1f}{:>13.1f}{:>9.3f}{:>9.0f}".format(name, *cells))


def _ratio(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times["stock"], strict=True))


def _peak_megabytes(name: str, work_dir: Path, args: argparse.Namespace) -> float:
    command = [
        sys.executable,
        __file__,
        f"--only={name}",
        f"--work_dir={work_dir}",
        f"--device={args.device}",
    ]
    command += [f"--batch_size={args.batch_size}", f"--dtype={args.dtype}", f"--lam_path={args.lam_path}"]
    command += ["--small" if args.small else "--no-small"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_megabytes"]


def main() -> None:
    args = arguments()
    if args.only:
        variant = Variant(args.only, args.work_dir, args)
        for _ in range(3):
            variant.step(variant.load())
        cuda = args.device.startswith("cuda")
        peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else _resident_megabytes()
        print(json.dumps({"peak_megabytes": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        work_dir = args.work_dir or Path(folder)
        work_dir.mkdir(parents=True, exist_ok=True)
        prepare(work_dir, args)
        measure(args, work_dir, [name for name in VARIANTS if args.villa_x or name != VARIANTS[-1]])


def _resident_megabytes() -> float:
    """Peak resident set; not `getrusage`, which counts the parent's as well across a spawn."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e3


if __name__ == "__main__":
    main()
