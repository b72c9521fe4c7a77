"""Precompute the LAM tokens of a LeRobot dataset.

    lerobot-lam-precompute --dataset.repo_id=lerobot/pusht --lam.path=microsoft/villa-x \
        --camera_key=observation.image --output_dir=./data/pusht_lam

A YAML file can hold the flags (`--config_path=precompute.yaml`); `--dataset-repo-id`, `--lam-model-path`,
`--camera-key`, `--output-dir`, `--batch-size`, `--no-vq-tokens` and `--episodes 0 1 2` are understood too.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lerobot.configs.default import DatasetConfig

from lerobot_lam_diffusion.lam import load_lam, resolve_lam
from lerobot_lam_diffusion.precompute.engine import Summary, precompute_tokens
from lerobot_lam_diffusion.precompute.frames import choose_camera
from lerobot_lam_diffusion.problems import raise_problems
from lerobot_lam_diffusion.scripts.command_line import LamSource, run_command
from lerobot_lam_diffusion.scripts.opening import open_dataset, open_metadata, usable_device
from lerobot_lam_diffusion.tokens.writer import refuse_existing

VIDEO_BACKENDS = ("torchcodec", "pyav", "video_reader")


@dataclass
class PrecomputeConfig:
    """Dataset → token store.

    Args:
        dataset: As in lerobot-train; `--dataset.episodes=[0,1]` extracts those only.
        lam: Which LAM.
        output_dir: Where the store will stand.
        camera_key: The dataset's camera that the LAM looks at; may be left out if there is only one.
        frame_stride: Gap of a frame pair, in frames.
        use_vq_tokens: Codebook rows (true) or the vectors before quantisation (false).
        dtype: Arithmetic of the encoder, float32 or bfloat16; the quantiser is always float32.
        batch_size: Frame pairs at a time; it does not change the tokens.
        device: cuda, mps, cpu; the best there is if left out.
        tolerance_s: As in lerobot-train: how far a frame may lie from its timestamp, in seconds.
    """

    dataset: DatasetConfig
    lam: LamSource
    output_dir: Path
    camera_key: str | None = None
    frame_stride: int = 1
    use_vq_tokens: bool = True
    dtype: str = "float32"
    batch_size: int = 64
    device: str | None = None
    tolerance_s: float = field(default=1e-4)

    def __post_init__(self) -> None:
        problems = []
        if self.frame_stride < 1:
            problems.append(f"--frame_stride={self.frame_stride} must be at least 1")
        if self.batch_size < 1:
            problems.append(f"--batch_size={self.batch_size} must be at least 1")
        if self.dtype not in ("float32", "bfloat16"):
            problems.append(f"--dtype={self.dtype} must be float32 or bfloat16")
        if self.dataset.streaming:
            problems.append("--dataset.streaming=true: extraction reads a dataset on disk; leave it out")
        if self.dataset.episodes == []:
            problems.append("--dataset.episodes is empty; name at least one, or leave it out for all")
        if self.dataset.video_backend not in VIDEO_BACKENDS:
            problems.append(
                f"--dataset.video_backend={self.dataset.video_backend} must be {' or '.join(VIDEO_BACKENDS)}"
            )
        raise_problems("these flags do not work", problems)


def precompute(config: PrecomputeConfig) -> None:
    """Check everything that can be checked quickly, then extract, then say what was made."""
    output_dir = config.output_dir.expanduser()
    refuse_existing(output_dir)
    resolve_lam(config.lam.path, config.lam.revision)
    device = usable_device(config.device)
    camera_key = choose_camera(open_metadata(config.dataset), config.camera_key)
    dataset = open_dataset(config.dataset, config.tolerance_s)
    lam = load_lam(
        config.lam.path,
        revision=config.lam.revision,
        device=device,
        dtype=getattr(torch, config.dtype),
    )
    summary = precompute_tokens(
        dataset,
        lam,
        output_dir,
        camera_key=camera_key,
        lam_path=recorded_path(config.lam.path),
        frame_stride=config.frame_stride,
        use_vq_tokens=config.use_vq_tokens,
        batch_size=config.batch_size,
        video_backend=config.dataset.video_backend,
    )
    print(report(summary, config))


def recorded_path(lam_path: str) -> str:
    """How a store names its LAM: a folder absolutely, so that training from elsewhere finds it again."""
    folder = Path(lam_path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else lam_path


def report(summary: Summary, config: PrecomputeConfig) -> str:
    """The closing lines: what was made, where it lies, what to run next."""
    store = summary.store
    assert store.provenance is not None
    usage = ", ".join(f"{perplexity:.1f}" for perplexity in summary.code_usage)
    lines = [
        f"frames    {summary.frames} in {summary.episodes} episodes",
        f"missing   {summary.missing} tokens (no frame {store.frame_stride} before them)",
        f"tokens    {store.kind}, {store.token_dim} numbers a frame, camera {store.provenance.camera_key}",
        f"time      {summary.seconds:.1f} s, {summary.frames / summary.seconds:.0f} frames/s",
        f"size      {summary.num_bytes:,} bytes",
        f"store     {store.path.resolve()}",
    ]
    if usage:
        of = store.provenance.lam.num_codes
        lines.insert(3, f"codebook  perplexity {usage} of {of} codes a slot")
    dataset = [f"--dataset.repo_id={config.dataset.repo_id}"]
    if config.dataset.root:
        dataset.append(f"--dataset.root={config.dataset.root}")
    if store.missing_episodes:
        dataset.append(f"--dataset.episodes={sorted(set(config.dataset.episodes or []))}".replace(" ", ""))
    tokens = f"--policy.lam_tokens_path={store.path.resolve()}"
    kind = "" if config.use_vq_tokens else " --policy.lam_use_vq_tokens=false"
    lines += [
        "",
        "Train on it:",
        f"  lerobot-train --policy.type=diffusion_lam {shlex.join(dataset)} \\",
        f"    --policy.use_precomputed_lam_tokens=true {shlex.quote(tokens)}{kind} \\",
        "    --policy.push_to_hub=false",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(PrecomputeConfig, precompute, argv)


if __name__ == "__main__":
    main()
