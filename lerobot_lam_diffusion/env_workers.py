"""Gymnasium environments in the worker processes of `lerobot-eval`.

With two or more environments, LeRobot evaluates in processes started by a fork server. Two things go wrong
there: the package that registers the environment, such as `gym_pusht`, is imported only in the main process;
and LeRobot asks each environment for `task_description` and `task`, which kills a worker whose environment
lacks them. The fork server therefore imports `env_workers_preload`, whose effects its children inherit.
"""

import multiprocessing
from importlib.util import find_spec
from typing import Any

import gymnasium

PACKAGES = ("gym_pusht", "gym_aloha")
"""What `--env.type=pusht` and `--env.type=aloha` import: light modules that register environments."""
PRELOAD = f"{__name__}_preload"


class TaskDescription(gymnasium.Wrapper):
    """Gives an environment the attributes that LeRobot asks for; empty if it has no task."""

    @property
    def task(self) -> Any:
        return getattr(self.env.unwrapped, "task", "")

    @property
    def task_description(self) -> Any:
        return getattr(self.env.unwrapped, "task_description", self.task)


def preload_environments() -> None:
    """Make the fork servers of this process import the environments of installed packages."""
    if any(find_spec(package) is not None for package in PACKAGES):
        # __main__ is what a fork server preloads by default; LeRobot adds no modules of its own.
        multiprocessing.set_forkserver_preload(["__main__", PRELOAD])
