"""A closed-loop task that needs motion: Gymnasium's Pendulum-v1 with its angular velocity hidden.

The pendulum has to be swung up and held there, with less torque than would lift it at once. One look at it
does not tell which way it moves, and without that it can neither be swung up nor held. Recorded as a LeRobot
dataset with encoded video; a policy sees (cos, sin) of the angle, the LAM sees pictures.
"""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor

from lerobot_lam_diffusion.demo.quiet import quiet_recording

from .data import ACTION, ENV, IMAGE, STATE, Recorded, load

EPISODES, LENGTH, FPS = 300, 100, 20
SIZE, SCREEN = 96, 352  # px; the rod is 40 px long in the picture
NOISE = 0.5  # of the torque while recording, so that demonstrations show how to recover
UPRIGHT = 0.3  # rad from the top
HOLD = 20  # last steps of an episode in which the pendulum has to be upright
FIRST_START = 50_000  # seeds of the test's starts; no demonstration has one of them
FEATURES = {
    IMAGE: {"dtype": "video", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]},
    STATE: {"dtype": "float32", "shape": (2,), "names": ["cos", "sin"]},
    ACTION: {"dtype": "float32", "shape": (1,), "names": ["torque"]},
}


def make_env(seed: int) -> Any:
    """Pendulum-v1 at its start of this seed."""
    env = gymnasium.make("Pendulum-v1", render_mode="rgb_array").unwrapped
    env.screen_dim = SCREEN
    env.reset(seed=seed)
    return env


def from_top(env: Any) -> float:
    """Angle from upright, in -π…π."""
    return float((env.state[0] + np.pi) % (2 * np.pi) - np.pi)


def expert(env: Any) -> float:
    """Torque of a controller that knows the velocity: pump energy until the top is near, then hold it."""
    angle, speed = from_top(env), env.state[1]
    if abs(angle) < 0.5 and abs(speed) < 4:
        return float(np.clip(-10 * angle - 2.5 * speed, -2, 2))
    if abs(speed) < 0.05:  # at rest: start either way
        return 2.0
    energy = speed**2 / 2 + 1.5 * env.g * (np.cos(angle) - 1)  # 0 when upright at rest
    return float(np.clip(-energy * speed, -2, 2))


def step(env: Any, torque: float) -> None:
    env.step(np.array([torque], np.float32))


def position(env: Any) -> np.ndarray:
    return np.array([np.cos(env.state[0]), np.sin(env.state[0])], np.float32)


def picture(env: Any) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8, without the arrow that Gymnasium draws for the torque."""
    env.last_u = None
    edge = SCREEN // 2 - SIZE
    middle = env.render()[edge:-edge, edge:-edge].astype(np.float32)
    return middle.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3)).round().astype(np.uint8)


def record(root: Path) -> LeRobotDataset:
    if not root.exists():
        part, rng = root.with_suffix(".part"), np.random.default_rng(0)
        with quiet_recording():
            dataset = LeRobotDataset.create("local/pendulum", FPS, FEATURES, root=part, video_backend="pyav")
            for seed in range(EPISODES):
                env = make_env(seed)
                for _ in range(LENGTH):
                    torque = expert(env)
                    action = np.array([torque], np.float32)
                    frame = {IMAGE: picture(env), STATE: position(env), ACTION: action, "task": "swing up"}
                    dataset.add_frame(frame)
                    step(env, torque + NOISE * rng.standard_normal())
                dataset.save_episode()
            dataset.finalize()
        part.rename(root)
    return LeRobotDataset("local/pendulum", root=root, video_backend="pyav", return_uint8=True)


def demonstrations(root: Path, folder: Path, held_out: int) -> Recorded:
    data = load(record(root), folder, held_out)
    data.columns[ENV] = data.columns[STATE]  # LeRobot's Diffusion Policy wants an environment's state
    return data


class Pendulums:
    """Several pendulums that advance in step, each from its own start.

    Attributes:
        up: Whether each was upright after each step so far, a list of (B,).
    """

    def __init__(self, starts: int) -> None:
        self.envs = [make_env(FIRST_START + start) for start in range(starts)]
        self.up: list[np.ndarray] = []

    @property
    def solved(self) -> np.ndarray:
        """Upright in all of the last `HOLD` steps (B,)."""
        return np.all(self.up[-HOLD:], axis=0)

    @property
    def coverage(self) -> np.ndarray:
        """Share of the steps in which each was upright (B,)."""
        return np.mean(self.up, axis=0)

    is_over = False  # a pendulum that is held may still fall

    def observed(self) -> dict[str, Tensor]:
        """State and environment's state (B, 2), as recorded."""
        found = torch.from_numpy(np.stack([position(env) for env in self.envs]))
        return {STATE: found, ENV: found}

    def frames(self) -> Tensor:
        """uint8 (B, 3, SIZE, SIZE)."""
        return torch.from_numpy(np.stack([picture(env) for env in self.envs])).permute(0, 3, 1, 2)

    def step(self, actions: Tensor) -> None:
        for env, torque in zip(self.envs, actions[:, 0].tolist(), strict=True):
            step(env, torque)
        self.up.append(np.array([abs(from_top(env)) < UPRIGHT for env in self.envs]))
