"""A closed-loop task that needs motion: Gymnasium's Pendulum-v1, held upright, its angular velocity hidden.

Kicks throw the pendulum off balance, and its motor is too weak to lift it again once it has fallen. One look
at it does not tell which way it moves, and without that it cannot be held. Recorded as a LeRobot dataset with
encoded video; a policy sees the angle, the LAM sees pictures.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor

from lerobot_lam_diffusion.demo.quiet import quiet_recording

from .data import ACTION, ENV, IMAGE, STATE, Recorded, load

EPISODES, LENGTH, FPS = 300, 60, 20
LONGEST = 120  # steps of an episode of the test
SIZE, SCREEN = 96, 704  # px; the rod is 80 px long in the picture
KICK, EVERY = 0.5, 10  # spread of a kick, rad/s; one in so many steps, at random
ANGLE, SPEED = 0.1, 0.5  # rad, rad/s: an episode starts within these of upright and rest
FALLEN = 0.5  # rad from upright
FIRST_START = 50_000  # seeds of the test's starts and kicks; no demonstration has one of them
FEATURES = {
    IMAGE: {"dtype": "video", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]},
    STATE: {"dtype": "float32", "shape": (1,), "names": ["angle"]},
    ACTION: {"dtype": "float32", "shape": (1,), "names": ["torque"]},
}


class Pendulum:
    """One episode; its seed decides start and kicks."""

    def __init__(self, seed: int) -> None:
        self.env = gymnasium.make("Pendulum-v1", render_mode="rgb_array").unwrapped
        self.env.screen_dim = SCREEN
        self.env.reset(seed=seed, options={"x_init": ANGLE, "y_init": SPEED})
        self.rng = np.random.default_rng(seed)

    @property
    def angle(self) -> float:
        """From upright, rad."""
        return float(self.env.state[0])

    @property
    def fallen(self) -> bool:
        return abs(self.angle) > FALLEN

    def expert(self) -> float:
        """Torque of a controller that knows the velocity."""
        return float(np.clip(-10 * self.angle - 2.5 * self.env.state[1], -2, 2))

    def step(self, torque: float) -> None:
        self.env.step(np.array([torque], np.float32))
        kick, is_kicked = self.rng.normal(0, KICK), self.rng.random() < 1 / EVERY
        self.env.state[1] += kick * is_kicked

    def picture(self) -> np.ndarray:
        """(SIZE, SIZE, 3) uint8 of what is above the axle, without the arrow that shows the torque."""
        self.env.last_u = None
        middle = SCREEN // 2
        above = self.env.render()[middle - 2 * SIZE + 16 : middle + 16, middle - SIZE : middle + SIZE]
        halved = above.astype(np.float32).reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
        return halved.round().astype(np.uint8)


def held_episodes() -> Iterator[list[dict[str, Any]]]:
    """Frames of the demonstrations in which the pendulum does not fall."""
    for seed in itertools.count():
        pendulum, frames = Pendulum(seed), []
        while not pendulum.fallen:
            if len(frames) == LENGTH:
                yield frames
                break
            torque = pendulum.expert()
            frames.append(
                {
                    IMAGE: pendulum.picture(),
                    STATE: np.array([pendulum.angle], np.float32),
                    ACTION: np.array([torque], np.float32),
                    "task": "hold it upright",
                }
            )
            pendulum.step(torque)


def record(root: Path) -> LeRobotDataset:
    if not root.exists():
        part = root.with_suffix(".part")
        with quiet_recording():
            dataset = LeRobotDataset.create("local/pendulum", FPS, FEATURES, root=part, video_backend="pyav")
            for frames in itertools.islice(held_episodes(), EPISODES):
                for frame in frames:
                    dataset.add_frame(frame)
                dataset.save_episode()
            dataset.finalize()
        part.rename(root)
    return LeRobotDataset("local/pendulum", root=root, video_backend="pyav", return_uint8=True)


def demonstrations(root: Path, folder: Path, held_out: int) -> Recorded:
    data = load(record(root), folder, held_out)
    data.columns[ENV] = data.columns[STATE]  # LeRobot's Diffusion Policy wants an environment's state
    return data


class Pendulums:
    """An arena of pendulums; one that has fallen stands still.

    Attributes:
        coverage: Share of the test's steps that each has been held for so far (B,).
    """

    def __init__(self, starts: int) -> None:
        self.all = [Pendulum(FIRST_START + start) for start in range(starts)]
        self.coverage = np.zeros(starts)

    @property
    def solved(self) -> np.ndarray:
        """Not fallen so far (B,)."""
        return np.array([not pendulum.fallen for pendulum in self.all])

    @property
    def is_over(self) -> bool:
        return not self.solved.any()

    def observed(self) -> dict[str, Tensor]:
        """State and environment's state (B, 1), as recorded."""
        found = torch.tensor([[pendulum.angle] for pendulum in self.all])
        return {STATE: found, ENV: found}

    def frames(self) -> Tensor:
        """uint8 (B, 3, SIZE, SIZE)."""
        return torch.from_numpy(np.stack([p.picture() for p in self.all])).permute(0, 3, 1, 2)

    def step(self, actions: Tensor) -> None:
        for pendulum, torque in zip(self.all, actions[:, 0].tolist(), strict=True):
            if not pendulum.fallen:
                pendulum.step(torque)
        self.coverage += self.solved / LONGEST
