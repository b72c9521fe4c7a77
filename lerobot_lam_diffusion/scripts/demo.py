"""The whole job in minutes and offline: record PushT, precompute LAM tokens, train on them, draw a picture.

    lerobot-lam-demo                                             # into outputs/demo, or outputs/demo_2, ...
    lerobot-lam-demo --lam.path=my_lam --steps=500
    lerobot-lam-demo --record_only=true --root=data/pusht --num_episodes=200 --near_goal=false

It needs the simulator: pip install 'lerobot[pusht]' shapely matplotlib.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub.constants

import lerobot_lam_commands
from lerobot_lam_diffusion.lam import read_config, resolve_lam
from lerobot_lam_diffusion.scripts.command_line import Command, LamFlags, run_command
from lerobot_lam_diffusion.scripts.next_step import new_folder, next_step
from lerobot_lam_diffusion.utils.errors import DemoError, raise_problems
from lerobot_lam_diffusion.utils.files import refuse_existing

DEFAULT_FOLDER = Path("outputs/demo")
SIMULATOR = ("gym_pusht", "pymunk", "shapely", "matplotlib")


@dataclass
class DemoConfig:
    """What `lerobot-lam-demo` makes.

    Args:
        output_dir: Folder of everything; must be empty. outputs/demo, or the first of outputs/demo_2, ...
            that does not exist.
        num_episodes: To record; the last one is held out of training.
        steps: Of training.
        seed: Of training.
        first_seed: Of the first recorded episode; each has its own.
        lam: Which LAM makes the tokens.
        device: For LAM and training. On a CPU two runs give the same figures.

    Only a dataset:
        record_only: Only record a dataset; the flags below go with it.
        root: Where; output_dir/pusht if left out.
        repo_id: Its name.
        near_goal: Short episodes near the goal; false: the task's own starts.
    """

    output_dir: Path | None = None
    num_episodes: int = 20
    steps: int = 100
    seed: int = 0
    first_seed: int = 0
    lam: LamFlags = field(default_factory=lambda: LamFlags("pusht-compact"))
    device: str = "cpu"
    record_only: bool = False
    root: Path | None = None
    repo_id: str = "local/pusht"
    near_goal: bool = True

    def __post_init__(self) -> None:
        problems = []
        least = 1 if self.record_only else 2
        if self.num_episodes < least:
            why = "" if self.record_only else ": one is held out of training"
            problems.append(f"--num_episodes={self.num_episodes} must be at least {least}{why}")
        if self.steps < 1:
            problems.append(f"--steps={self.steps} must be at least 1")
        seeds = {"seed": self.seed, "first_seed": self.first_seed}
        problems += [f"--{name}={seed} must not be negative" for name, seed in seeds.items() if seed < 0]
        only_recording = {"root": None, "repo_id": "local/pusht", "near_goal": True}
        if not self.record_only:
            problems += [
                f"--{name}={getattr(self, name)} goes with --record_only=true; leave it out"
                for name, default in only_recording.items()
                if getattr(self, name) != default
            ]
        raise_problems("these flags do not work", problems)


COMMAND = Command("lerobot-lam-demo", DemoConfig, __doc__)


def run_demo(config: DemoConfig) -> None:
    """Run the quick checks, then only record, or run the whole demo."""
    require_simulator()
    go_offline()
    # Only now: these need the simulator.
    from lerobot_lam_diffusion.demo.story import precompute_command, record, tell_story

    if config.record_only:
        root = config.root or (config.output_dir or DEFAULT_FOLDER) / "pusht"
        print(f"{record(config, root)}: {root}")
        print(next_step(precompute_command(config, root, root.with_name(f"{root.name}_lam"))))
        return
    if not read_config(resolve_lam(config.lam.path, config.lam.revision)).num_codes:
        raise DemoError(
            f"--lam.path={config.lam.path} has no codebook, and the demo draws codes; name another LAM"
        )
    folder = config.output_dir or new_folder(DEFAULT_FOLDER)
    refuse_existing(folder)
    tell_story(config, folder)


def require_simulator() -> None:
    """Raise a UserError unless the extra `pusht` is installed."""
    missing = [name for name in SIMULATOR if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"the demo needs {', '.join(missing)}, not installed here. Install the simulator: "
            "pip install 'lerobot[pusht]' shapely matplotlib"
        )


def go_offline() -> None:
    """No request to the Hub from here on, in this process and in the commands that it starts."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # read from the environment long ago


def main(argv: Sequence[str] | None = None) -> None:
    run_command(COMMAND, run_demo, argv)


if __name__ == "__main__":
    lerobot_lam_commands.demo()
