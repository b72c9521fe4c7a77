"""A recorded LeRobot dataset as tensors, decoded once; windows of it as LeRobot cuts them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor

from lerobot_lam_diffusion.precompute.frames import EpisodeFrames

STATE, ENV, ACTION, IMAGE = (
    "observation.state",
    "observation.environment_state",
    "action",
    "observation.image",
)


@dataclass
class Recorded:
    """All frames of a dataset, in order.

    Attributes:
        columns: Key → float32 (F, D), as recorded.
        frames: uint8 (F, 3, H, W).
        episode: int64 (F,).
        held_out: The last so many episodes are for measuring, the others for training.
    """

    columns: dict[str, Tensor]
    frames: Tensor
    episode: Tensor
    held_out: int

    def __post_init__(self) -> None:
        lengths = torch.bincount(self.episode)
        self.stop = lengths.cumsum(0)
        self.start = self.stop - lengths
        self.train_episodes = len(lengths) - self.held_out

    def frames_of(self, first: int, stop: int) -> Tensor:
        """Indices of the frames of the episodes `first … stop - 1`."""
        return torch.arange(int(self.start[first]), int(self.stop[stop - 1]))

    @property
    def train_frames(self) -> Tensor:
        return self.frames_of(0, self.train_episodes)

    @property
    def held_out_frames(self) -> Tensor:
        return self.frames_of(self.train_episodes, len(self.stop))

    def normalized(self) -> dict[str, Tensor]:
        """The columns on -1…1 by the training episodes' extremes: LeRobot's MIN_MAX, for ENV as well."""
        return {key: self.normalize(key, values) for key, values in self.columns.items()}

    def normalize(self, key: str, values: Tensor) -> Tensor:
        low, spread = self._scale(key)
        return (values - low) / spread * 2 - 1

    def denormalize(self, key: str, values: Tensor) -> Tensor:
        low, spread = self._scale(key)
        return (values + 1) / 2 * spread + low

    def _scale(self, key: str) -> tuple[Tensor, Tensor]:
        values = self.columns[key][self.train_frames]
        low = values.amin(0)
        return low, (values.amax(0) - low).clamp(min=1e-6)

    def without_keypoints(self) -> "Recorded":
        return replace(self, columns={key: self.columns[key] for key in (STATE, ACTION)})

    def window(self, index: Tensor, deltas: list[int]) -> tuple[Tensor, Tensor]:
        """Frames (B, T) of a window, clamped to the episode as LeRobot does, and which ones were (B, T)."""
        wanted = index[:, None] + torch.tensor(deltas)
        episode = self.episode[index, None]
        frames = wanted.clamp(self.start[episode], self.stop[episode] - 1)
        return frames, frames != wanted


def load(dataset: LeRobotDataset, folder: Path, held_out: int) -> Recorded:
    """Read a dataset; its decoded frames are kept in `folder`."""
    table = dataset.hf_dataset.with_format("numpy")
    columns = {
        key: torch.from_numpy(np.stack(table[key])).float().reshape(len(table), -1)
        for key in (STATE, ENV, ACTION)
        if key in dataset.features
    }
    episode = torch.from_numpy(np.array(table["episode_index"]))
    path = folder / "frames.npy"
    if not path.exists():
        height, width, _ = dataset.features[IMAGE]["shape"]
        partial = path.with_suffix(".partial")
        frames = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(episode), 3, height, width))
        source, at = EpisodeFrames(dataset, IMAGE, "pyav"), 0
        for number in range(dataset.num_episodes):
            for chunk in source.chunks(number):
                frames[at : at + len(chunk)] = chunk.numpy()
                at += len(chunk)
        frames.flush()
        partial.rename(path)
    return Recorded(columns, torch.from_numpy(np.load(path)), episode, held_out)


def reset_to_start(env: Any, seed: int, near_goal: bool) -> dict[str, np.ndarray]:
    """The first observation of the start that belongs to this seed, as `demo.expert.plan_episode` has it."""
    from lerobot_lam_diffusion.demo.expert import near_goal_start

    options = near_goal_start(np.random.default_rng(seed)) if near_goal else None
    return env.reset(seed=seed, options=options)[0]


def replayed_keypoints(data: Recorded, first_seed: int, near_goal: bool) -> Tensor:
    """Keypoints of PushT's block (F, 16), which the recording lacks: its actions, acted out again.

    Raises:
        ValueError: an episode does not take the course that was recorded.
    """
    from lerobot_lam_diffusion.demo.pusht import make_env

    env, seed, keypoints = make_env("environment_state_agent_pos"), first_seed, []
    for start, stop in zip(data.start.tolist(), data.stop.tolist(), strict=True):
        states, actions = data.columns[STATE][start:stop].numpy(), data.columns[ACTION][start:stop].numpy()
        observation = reset_to_start(env, seed, near_goal)
        while np.abs(observation["agent_pos"] - states[0]).max() > 0.01:  # seeds without a demonstration
            seed += 1
            if seed > first_seed + 10 * len(data.stop):
                raise ValueError(f"no seed from {first_seed} on starts as the episode at frame {start}")
            observation = reset_to_start(env, seed, near_goal)
        for state, action in zip(states, actions, strict=True):
            if np.abs(observation["agent_pos"] - state).max() > 0.01:
                raise ValueError(f"seed {seed} is not what was recorded from frame {start} on")
            keypoints.append(observation["environment_state"])
            observation, *_ = env.step(action)
        seed += 1
    return torch.from_numpy(np.stack(keypoints)).float()


def pusht(root: Path, work_dir: Path, held_out: int, first_seed: int, near_goal: bool = False) -> Recorded:
    """PushT demonstrations with keypoints, cached as tensors in `work_dir`."""
    cached = work_dir / "columns.pt"
    if not cached.exists():
        dataset = LeRobotDataset("local/pusht", root=root, video_backend="pyav", return_uint8=True)
        data = load(dataset, work_dir, held_out)
        data.columns[ENV] = replayed_keypoints(data, first_seed, near_goal)
        torch.save({"columns": data.columns, "episode": data.episode}, cached)
    saved = torch.load(cached, weights_only=True)
    return Recorded(
        saved["columns"], torch.from_numpy(np.load(work_dir / "frames.npy")), saved["episode"], held_out
    )
