"""The demo's commands as argument lists: what is printed is what runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lerobot_lam_diffusion.demo.record import IMAGE_KEY


def record_command(
    root: Path, repo_id: str, num_episodes: int, near_goal: bool, first_seed: int
) -> list[str]:
    return [
        "lerobot-lam-demo",
        "--record_only=true",
        f"--repo_id={repo_id}",
        f"--root={root}",
        f"--num_episodes={num_episodes}",
        f"--near_goal={str(near_goal).lower()}",
        f"--first_seed={first_seed}",
    ]


def precompute_command(
    repo_id: str, root: Path, lam_path: str, lam_revision: str | None, output_dir: Path, device: str
) -> list[str]:
    return [
        "lerobot-lam-precompute",
        f"--dataset.repo_id={repo_id}",
        f"--dataset.root={root}",
        f"--lam.path={lam_path}",
        *([f"--lam.revision={lam_revision}"] if lam_revision else []),
        f"--camera_key={IMAGE_KEY}",
        "--frame_stride=1",
        f"--output_dir={output_dir}",
        f"--device={device}",
    ]


def fit_command(repo_id: str, root: Path, output_dir: Path) -> list[str]:
    """A LAM of one's own, on the same frames. Printed only: it takes hours without a GPU."""
    return [
        "lerobot-lam-fit",
        f"--dataset.repo_id={repo_id}",
        f"--dataset.root={root}",
        f"--camera_key={IMAGE_KEY}",
        f"--output_dir={output_dir}",
    ]


def train_command(
    repo_id: str,
    root: Path,
    episodes: Sequence[int],
    tokens: Path,
    output_dir: Path,
    steps: int,
    seed: int,
    device: str,
) -> list[str]:
    """Stock LeRobot on precomputed tokens, with a network small enough for two CPU cores (0.5 s a step)."""
    return [
        "lerobot-train",
        "--policy.type=diffusion_lam",
        "--policy.use_precomputed_lam_tokens=true",
        f"--policy.lam_tokens_path={tokens}",
        f"--dataset.repo_id={repo_id}",
        f"--dataset.root={root}",
        f"--dataset.episodes=[{','.join(map(str, episodes))}]",
        f"--output_dir={output_dir}",
        f"--steps={steps}",
        f"--save_freq={steps}",
        "--log_freq=1",
        "--batch_size=8",
        "--num_workers=0",
        f"--seed={seed}",
        "--policy.horizon=16",
        "--policy.n_action_steps=8",
        "--policy.down_dims=[64,128]",
        "--policy.pretrained_backbone_weights=null",
        "--policy.optimizer_lr=1e-3",
        "--policy.scheduler_warmup_steps=10",
        f"--policy.device={device}",
        "--policy.push_to_hub=false",
        "--wandb.enable=false",
    ]
