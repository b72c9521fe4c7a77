"""What a command on the way to training prints last: the command that comes next, ready to be run."""

import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

import torch

from lerobot_lam_diffusion.scripts.command_line import usable_device
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.provenance import VIDEOS, VQ

SMALL_TRAINING = (
    "--policy.down_dims=[64,128]", "--batch_size=8", "--steps=100", "--num_workers=0", "--log_freq=10",
)  # fmt: skip
"""A network and a training that two CPU cores finish in minutes."""


def next_step(command: Sequence[str], why: str = "Next", fps: float | None = None) -> str:
    """The closing lines: the command, then what the user may need to know about it.

    Args:
        fps: Frame rate of the training dataset, at which a robot has to run the policy.
    """
    lines = ["", f"{why}:", indent(shell_text(command), "  ")]
    if command[0] != "lerobot-train":
        return "\n".join(lines)
    few = ""
    if usable_device(None) == "cpu":
        lines.append(f"For a first try on a CPU add {shlex.join(SMALL_TRAINING)}")
        few = " --eval.n_episodes=1 --eval.batch_size=1 --policy.num_inference_steps=10"
    flags = dict(word.split("=", 1) for word in command[1:])
    policy = shlex.quote(f"--policy.path={flags['--output_dir']}/checkpoints/last/pretrained_model")
    use = f"lerobot-rollout {policy}{'' if fps is None else f' --fps={fps:g}'} and the flags of your robot"
    if "pusht" in flags["--dataset.repo_id"]:
        use = f"lerobot-eval {policy} --env.type=pusht{few}"
    return "\n".join([*lines, f"After it: {use}"])


def shell_text(argv: Sequence[str], width: int = 100) -> str:
    """The command for a shell, quoted, on as many continued lines as it needs."""
    lines = [""]
    for word in map(shlex.quote, argv):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return " \\\n".join(lines)


def train_on(
    store: TokenStore, tokens: str | Path, repo_id: str, root: str | Path | None = None
) -> list[str]:
    """The `lerobot-train` command for the store that `tokens` names, on the episodes that it covers.

    A store of demonstration videos has no actions to train on: its command is guidance (see `follow`).
    """
    if repo_id.startswith(VIDEOS):
        return follow(tokens)
    return training(
        repo_id,
        root,
        *(
            [f"--dataset.episodes=[{','.join(map(str, store.covered_episodes))}]"]
            if store.missing_episodes
            else []
        ),
        "--policy.use_precomputed_lam_tokens=true",
        f"--policy.lam_tokens_path={tokens}",
        *([] if store.kind == VQ else ["--policy.lam_use_vq_tokens=false"]),
    )


def training(repo_id: str, root: str | Path | None, *source: str) -> list[str]:
    """`lerobot-train` on a dataset, its tokens from the source that these flags name."""
    return [
        "lerobot-train",
        "--policy.type=diffusion_lam",
        *dataset_flags(repo_id, root),
        *source,
        "--policy.push_to_hub=false",
        *without_network(),
        f"--output_dir={new_folder(Path('outputs') / f'{repo_id.rpartition("/")[2]}_lam')}",
    ]


def new_folder(folder: Path) -> Path:
    """A folder that does not exist yet: this one, or the first of the same name with _2, _3, ..."""
    numbered = (folder.with_name(f"{folder.name}_{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([folder], numbered) if not each.exists())


def without_network() -> list[str]:
    """What `lerobot-train` needs where the backbone's weights can be neither found nor fetched."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    kept = list((Path(torch.hub.get_dir()) / "checkpoints").glob("resnet18-*.pth"))
    return ["--policy.pretrained_backbone_weights=null"] if offline and not kept else []


def follow(tokens: str | Path) -> list[str]:
    """`lerobot-eval` of a policy that follows the first demonstration of a store."""
    return ["lerobot-eval", "--policy.path=<policy>", f"--policy.lam_guidance={tokens}#0"]


def dataset_flags(repo_id: str, root: str | Path | None) -> list[str]:
    return [f"--dataset.repo_id={repo_id}", *([f"--dataset.root={root}"] if root else [])]
