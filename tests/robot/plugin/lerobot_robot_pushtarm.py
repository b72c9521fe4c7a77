"""A robot and a teleoperator as a third party would write them: the agent of gym-pusht, with a camera.

Where `PUSHTARM_LOG` names a file, the robot writes what happened into it when it is disconnected: `frames`,
all that it gave, and `tokens` with `at`, each single token that a square linear without bias was given (the
policy's `lam_projection`) and how many frames had been given by then.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gym_pusht  # noqa: F401
import gymnasium
import numpy as np
import torch
from lerobot.robots import Robot, RobotConfig
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig
from torch.nn.modules.module import register_module_forward_pre_hook

JOINTS = ("x.pos", "y.pos")


@RobotConfig.register_subclass("pushtarm")
@dataclass
class PushtArmConfig(RobotConfig):
    seed: int = 3


class _Device:
    """What robot and teleoperator have in common: nothing to calibrate or configure."""

    is_connected = False
    is_calibrated = True

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    @cached_property
    def action_features(self) -> dict[str, type]:
        return dict.fromkeys(JOINTS, float)


class PushtArm(_Device, Robot):
    config_class = PushtArmConfig
    name = "pushtarm"

    def __init__(self, config: PushtArmConfig) -> None:
        super().__init__(config)
        self.config = config
        self._env = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos", max_episode_steps=10**6)
        self.cameras = {"top": None}  # LeRobot counts them
        self._frames: list[np.ndarray] = []
        self._tokens: list[tuple[int, np.ndarray]] = []

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        return {**dict.fromkeys(JOINTS, float), "top": (96, 96, 3)}

    def connect(self, calibrate: bool = True) -> None:
        self._seen, _ = self._env.reset(seed=self.config.seed)
        self.is_connected = True
        register_module_forward_pre_hook(self._tap)

    def get_observation(self) -> dict[str, Any]:
        self._frames.append(self._seen["pixels"].copy())
        return {
            **dict(zip(JOINTS, map(float, self._seen["agent_pos"]), strict=True)),
            "top": self._frames[-1],
        }

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        target = np.clip([action[joint] for joint in JOINTS], 0, 512)
        self._seen = self._env.step(target.astype("float32"))[0]
        return dict(zip(JOINTS, map(float, target), strict=True))

    def disconnect(self) -> None:
        self.is_connected = False
        if "PUSHTARM_LOG" in os.environ:
            at, tokens = zip(*self._tokens, strict=True) if self._tokens else ((), ())
            np.savez(os.environ["PUSHTARM_LOG"], frames=self._frames, at=at, tokens=tokens)

    def _tap(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        is_square = isinstance(module, torch.nn.Linear) and module.in_features == module.out_features
        if (
            is_square and module.bias is None and inputs[0].shape[:-1] == (1, 1)
        ):  # the LAM's own see many tokens
            self._tokens.append((len(self._frames), inputs[0].numpy(force=True)))


@TeleoperatorConfig.register_subclass("pushtarm_circle")
@dataclass
class PushtCircleConfig(TeleoperatorConfig):
    radius: float = 120.0


class PushtCircle(_Device, Teleoperator):
    """Leads the agent in circles."""

    config_class = PushtCircleConfig
    name = "pushtarm_circle"
    feedback_features: dict[str, type] = {}  # noqa: RUF012

    def __init__(self, config: PushtCircleConfig) -> None:
        super().__init__(config)
        self.config = config
        self._ticks = 0

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True

    def get_action(self) -> dict[str, float]:
        self._ticks += 1
        angle = self._ticks / 4
        where = 256 + self.config.radius * np.array([np.cos(angle), np.sin(angle)])
        return dict(zip(JOINTS, map(float, where), strict=True))

    def send_feedback(self, feedback: dict[str, Any]) -> None: ...

    def disconnect(self) -> None:
        self.is_connected = False
