"""What a LAM sees in one episode, as plain arrays for the picture: frames, predictions, codes, motion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lerobot.datasets import LeRobotDataset

from lerobot_lam_diffusion.demo.record import IMAGE_KEY
from lerobot_lam_diffusion.lam import LatentActionModel, load_lam
from lerobot_lam_diffusion.tokens import TokenStore

_MOVING = 0.1  # of the range of a pixel: what changed more than that between two frames moves


@dataclass(frozen=True)
class EpisodeLook:
    """One episode of T frames, at the LAM's resolution R, with VQ tokens of stride 1.

    Attributes:
        episode: Its number in the dataset.
        frames: uint8 (T, R, R, 3).
        predicted: uint8 (T - 1, R, R, 3): frame i + 1 as the FDM sees it, from frame i and token i + 1.
        codes: int (T, n), -1 where there is no token.
        motion: float (T, 2), px of the 512 px arena that the pusher moved since the frame before; 0 at first.
        code_motion: float (n, K, 2), mean `motion` of each code over the dataset's other episodes.
    """

    episode: int
    fps: float
    frames: np.ndarray
    predicted: np.ndarray
    codes: np.ndarray
    motion: np.ndarray
    code_motion: np.ndarray

    @property
    def copy_error(self) -> np.ndarray:
        """(T - 1, R, R) in 0..1: error of using the previous frame as the prediction."""
        return _difference(self.frames[1:], self.frames[:-1])

    @property
    def fdm_error(self) -> np.ndarray:
        """(T - 1, R, R) in 0..1: how wrong the prediction is."""
        return _difference(self.frames[1:], self.predicted)

    @property
    def moving_errors(self) -> tuple[float, float]:
        """Mean error of prediction and of copying, over the pixels that move."""
        moving = self.copy_error > _MOVING
        if not moving.any():
            return 0.0, 0.0
        return float(self.fdm_error[moving].mean()), float(self.copy_error[moving].mean())


def look_at_episode(
    root: Path, repo_id: str, episode: int, store: TokenStore, lam_path: str, lam_revision: str | None
) -> EpisodeLook:
    """Decode an episode and predict each of its frames from the one before and the stored token."""
    dataset = LeRobotDataset(repo_id, root=root, video_backend="pyav", return_uint8=True)
    lam = load_lam(lam_path, revision=lam_revision, fdm=True)
    start, stop = int(store.episode_from[episode]), int(store.episode_to[episode])
    frames = torch.stack([dataset[i][IMAGE_KEY] for i in range(start, stop)])  # (T, 3, H, W)
    tokens = store.window(torch.arange(start, stop), [0])[:, 0]  # (T, n·a)
    states = np.asarray(dataset.hf_dataset.with_format("numpy")["observation.state"], dtype=np.float64)
    codes, motion = _codes(store), _motion(states, store)
    others = np.ones(len(codes), dtype=bool)
    others[start:stop] = False
    return EpisodeLook(
        episode=episode,
        fps=dataset.fps,
        frames=_as_images(lam.resize(frames)),
        predicted=_as_images(_predict(lam, frames[:-1], tokens[1:])),
        codes=codes[start:stop],
        motion=motion[start:stop],
        code_motion=_mean_motion(codes[others], motion[others], lam.num_codes),
    )


def _predict(lam: LatentActionModel, frames: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    parts = zip(frames.split(16), tokens.split(16), strict=True)
    return torch.cat([lam.predict_next(*part) for part in parts])


def _codes(store: TokenStore) -> np.ndarray:
    """(N, n) codes of all frames, -1 where there is none. The store covers the whole dataset in order."""
    codes = store.values.numpy().astype(int)
    codes[store.episode_from.numpy()] = -1
    return codes


def _motion(states: np.ndarray, store: TokenStore) -> np.ndarray:
    motion = np.diff(states, axis=0, prepend=states[:1])
    motion[store.episode_from.numpy()] = 0.0
    return motion


def _mean_motion(codes: np.ndarray, motion: np.ndarray, num_codes: int) -> np.ndarray:
    """(n, K, 2); 0 for a code that does not occur."""
    occurs = codes.T[:, :, None] == np.arange(num_codes)  # (n, N, K)
    total = np.einsum("snk,nd->skd", occurs, motion)
    return total / np.maximum(occurs.sum(axis=1), 1)[..., None]


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean over the colours of |a - b|, in 0..1."""
    return np.abs(a.astype(np.float32) - b).mean(axis=-1) / 255


def _as_images(frames: torch.Tensor) -> np.ndarray:
    """uint8 (T, 3, R, R) → (T, R, R, 3)."""
    return frames.cpu().permute(0, 2, 3, 1).numpy()
