"""The story of `lerobot-lam-demo`: record, precompute, train, look. Each step is a command to repeat."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

from lerobot_lam_diffusion.demo.episode_look import look_at_episode
from lerobot_lam_diffusion.demo.picture import draw_picture
from lerobot_lam_diffusion.demo.record import IMAGE_KEY, record_pusht
from lerobot_lam_diffusion.scripts.next_step import dataset_flags, next_step, shell_text
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.utils.errors import DemoError

if TYPE_CHECKING:
    from lerobot_lam_diffusion.scripts.demo import DemoConfig

_AVERAGED_STEPS = 10  # of the loss at the start and at the end
_LOSS = re.compile(r"\bstep:\S+ .*?\bloss:(\S+)")  # what lerobot-train logs of a step


def tell_story(config: DemoConfig, folder: Path) -> None:
    """Run the whole demo; `folder` must be empty or not exist.

    Raises:
        DemoError: a command failed.
    """
    root, tokens, training = folder / "pusht", folder / "tokens", folder / "train"
    picture, log, held_out = folder / "lam_demo.png", folder / "train.log", config.num_episodes - 1
    print(f"LAM tokens for a diffusion policy: PushT, offline (HF_HUB_OFFLINE=1), into {folder}/")

    _begin(1, "Record: a planning expert pushes the T onto its target", record_command(config, root))
    print(record(config, root))

    precompute = precompute_command(config, root, tokens)
    _begin(2, "Precompute: the LAM turns each frame pair into a token", precompute)
    run(precompute)

    train = train_command(config, root, tokens, training)
    _begin(3, f"Train: stock lerobot-train, a small network; episode {held_out} is held out", train)
    print(f"It takes a minute or more, and logs into {log}", flush=True)
    run(train, log)
    losses = losses_of(log.read_text(errors="replace"))
    print(loss_facts(losses))

    _begin(4, f"Look: what the tokens say about episode {held_out}")
    store = TokenStore.open(tokens)
    look = look_at_episode(root, config.repo_id, held_out, store, config.lam.path, config.lam.revision)
    draw_picture(look, losses, picture)
    moving, moving_copy = (100 * error for error in look.moving_errors)
    whole, whole_copy = 100 * look.fdm_error.mean(), 100 * look.copy_error.mean()
    print(f"next frame, mean error with the token: {moving:.1f} % on moving pixels, {whole:.1f} % on all")
    print(f"if nothing moved: {moving_copy:.1f} % on moving pixels, {whole_copy:.1f} % on all")

    made = {
        "dataset": root,
        "tokens": tokens,
        "policy": training / "checkpoints" / "last" / "pretrained_model",
        "picture": picture,
    }
    print("\nWhat was made:\n\n" + "\n".join(f"  {name:<9}{path}" for name, path in made.items()))
    print(what_next(config, folder))


def _begin(number: int, title: str, command: Sequence[str] = ()) -> None:
    """The heading of a step, and its command."""
    print(f"\n[{number}/4] {title}\n")
    if command:
        print(f"{indent(shell_text(command), '  ')}\n", flush=True)


def record(config: DemoConfig, root: Path) -> str:
    """`lerobot-lam-demo --record_only=true`: the expert's episodes; what was recorded.

    Raises:
        FileExistsError: `root` holds something already.
    """
    summary = record_pusht(
        root,
        config.repo_id,
        config.num_episodes,
        near_goal=config.near_goal,
        first_seed=config.first_seed,
        show_progress=True,
    )
    left_out = f", {len(summary.failed_seeds)} unsolved starts left out" if summary.failed_seeds else ""
    return f"{len(summary.seeds)} episodes, {summary.num_frames:,} frames{left_out}"


def run(argv: Sequence[str], log: Path | None = None) -> None:
    """Run a command of this environment; its output goes to the console, or into a log unless it fails.

    Raises:
        DemoError: it ended with another status than 0.
    """
    here = str(Path(sys.executable).parent)  # first on the PATH, whether the environment is activated or not
    environment = {
        # PyTorch's waiting threads sleep instead of spinning: 0.84 s a step instead of 1.42 on a busy core.
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
    }
    sys.stdout.flush()
    if log is None:
        status = subprocess.run(argv, env=environment).returncode
    else:
        with log.open("wb") as output:
            status = subprocess.run(argv, env=environment, stdout=output, stderr=output).returncode
        if status != 0:
            print(log.read_text(errors="replace"), file=sys.stderr)
    if status != 0:
        raise DemoError(
            f"this command ended with status {status}; what it said is above:\n{shell_text(argv)}"
        )


def losses_of(log: str) -> list[float]:
    """The loss of each step that `lerobot-train --log_freq=1` has logged.

    Raises:
        DemoError: there is none.
    """
    losses = [float(loss) for loss in _LOSS.findall(log)]
    if not losses:
        raise DemoError(
            "lerobot-train ended well but logged no loss, expected one a step: its log lines are not those "
            "of LeRobot 0.6. Install lerobot>=0.6.1,<0.7"
        )
    return losses


def loss_facts(losses: list[float]) -> str:
    window = min(_AVERAGED_STEPS, max(1, len(losses) // 2))
    first, last = (sum(part) / window for part in (losses[:window], losses[-window:]))
    return f"{len(losses)} steps, loss {first:.3f} -> {last:.3f} (means of the first and last {window})"


def record_command(config: DemoConfig, root: Path) -> list[str]:
    return [
        "lerobot-lam-demo",
        "--record_only=true",
        f"--root={root}",
        f"--num_episodes={config.num_episodes}",
        f"--first_seed={config.first_seed}",
    ]


def precompute_command(config: DemoConfig, root: Path, tokens: Path) -> list[str]:
    return [
        "lerobot-lam-precompute",
        *dataset_flags(config.repo_id, root),
        f"--lam.path={config.lam.path}",
        *([f"--lam.revision={config.lam.revision}"] if config.lam.revision else []),
        f"--camera_key={IMAGE_KEY}",
        "--frame_stride=1",
        f"--output_dir={tokens}",
        f"--device={config.device}",
    ]


def train_command(config: DemoConfig, root: Path, tokens: Path, output_dir: Path) -> list[str]:
    """Stock LeRobot on precomputed tokens, with a network small enough for two CPU cores (0.5 s a step)."""
    return [
        "lerobot-train",
        "--policy.type=diffusion_lam",
        "--policy.use_precomputed_lam_tokens=true",
        f"--policy.lam_tokens_path={tokens}",
        *dataset_flags(config.repo_id, root),
        f"--dataset.episodes=[{','.join(map(str, range(config.num_episodes - 1)))}]",
        f"--output_dir={output_dir}",
        f"--steps={config.steps}",
        f"--save_freq={config.steps}",
        "--log_freq=1",
        "--batch_size=8",
        "--num_workers=0",
        f"--seed={config.seed}",
        "--policy.horizon=16",
        "--policy.n_action_steps=8",
        "--policy.down_dims=[64,128]",
        "--policy.pretrained_backbone_weights=null",
        "--policy.optimizer_lr=1e-3",
        "--policy.scheduler_warmup_steps=10",
        f"--policy.device={config.device}",
        "--policy.push_to_hub=false",
        "--wandb.enable=false",
    ]


def what_next(config: DemoConfig, folder: Path) -> str:
    """Commands to go on with."""
    data = dataset_flags(config.repo_id, folder / "pusht")
    own_lam = ["lerobot-lam-fit", *data, f"--camera_key={IMAGE_KEY}", f"--output_dir={folder / 'my_lam'}"]
    precompute = [
        "lerobot-lam-precompute",
        "--dataset.repo_id=YOU/DATASET",
        "--lam.path=microsoft/villa-x",
        "--camera_key=observation.images.top",
        "--frame_stride=3",
        "--output_dir=data/my_tokens",
    ]
    here = Path(sys.executable).parent
    first = "" if shutil.which("lerobot-train") else f"\nFirst: export PATH={here}:$PATH\n"
    return first + "\n".join(
        [
            next_step(["lerobot-lam-tokens", "info", str(folder / "tokens")], "Next, look into the store"),
            next_step(own_lam, "Fit a LAM of your own to the same frames (hours without a GPU)"),
            next_step(precompute, "Or do the same with your dataset and villa-X (stride 3: 0.1 s at 30 fps)"),
        ]
    )
