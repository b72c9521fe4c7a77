"""Gymnasium environments in the worker processes of `lerobot-eval`.

From two environments on, LeRobot evaluates in processes that a fork server starts, and two things go wrong
there: the package that registers the environment, `gym_pusht` for example, is imported in the main process
only; and LeRobot asks each environment for `task_description` and `task`, which ends a worker whose
environment has none. So the fork server is asked to import `env_workers_preload`, whose effects its children
inherit.
"""

import multiprocessing
from importlib.util import find_spec
from typing import Any

import gymnasium

PACKAGES = ("gym_pusht", "gym_aloha")
"""What `--env.type=pusht` and `--env.type=aloha` import: light modules that register environments."""
PRELOAD = f"{__name__}_preload"


class TaskDescription(gymnasium.Wrapper):
    """Gives an environment the attributes that LeRobot asks for: its task if it has one, else no words."""

    @property
    def task(self) -> Any:
        return getattr(self.env.unwrapped, "task", "")

    @property
    def task_description(self) -> Any:
        return getattr(self.env.unwrapped, "task_description", self.task)


def preload_environments() -> None:
    """Have the fork servers of this process know the environments of installed packages."""
    if any(find_spec(package) is not None for package in PACKAGES):
        # __main__ is what a fork server preloads by default; LeRobot adds no modules of its own.
        multiprocessing.set_forkserver_preload(["__main__", PRELOAD])
