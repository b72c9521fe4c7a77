"""Where motion must be seen: a conveyor whose speed differs by episode, and no single picture tells it.

    python -m tests.benchmarks.study.conveyor --work_dir=WORK [--study=2]

A block rides through the picture; the action is where it will be `LEAD` frames later, where a gripper has
to close. Recorded as a LeRobot dataset with encoded video; the LAM sees pixels of training episodes only.
"""

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SVT_LOG", "1")

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor

from lerobot_lam_diffusion.demo.quiet import quiet_recording
from lerobot_lam_diffusion.lam.fit.recipe import FLOW_TERM, STATE_TERM

from . import lams
from .data import ACTION, ENV, IMAGE, STATE, Recorded, load
from .lams import LamChoice, Tokens
from .policies import Budget, Windows, denoised, errors, train
from .results import Results

HELD_OUT, LENGTH, FPS = 60, 12, 10
SIZE, BLOCK, LEAD, FASTEST = 96, 12, 8, 3.0  # px; frames; px a frame
GRIP = 5.0  # px that a grip may miss the block's middle by
SEEDS = (0, 1, 2)
LAM_BATCH, PRESET = 32, "compact"
Condition = tuple[int, str | None, LamChoice | None]  # observations; which tokens; of which LAM


@dataclass(frozen=True)
class Study:
    """One registered run.

    Attributes:
        train: Training episodes.
        one_scale: Pixels are normalised by their common extremes; else each by its own, which blows up the
            codec's noise wherever nothing moves.
        conditions: By name.
    """

    train: int
    budget: Budget
    one_scale: bool
    conditions: dict[str, Condition]


SHORT, PIXELS = LamChoice(400), LamChoice(1200)
PLACE, OF_FLOW = LamChoice(1200, STATE_TERM), LamChoice(1200, FLOW_TERM)
STUDIES = {
    2: Study(
        120,
        Budget(every=1),
        False,
        {
            "stock, 1 observation": (1, None, None),
            "stock, 2 observations": (2, None, None),
            "1 observation and LAM token": (1, "latest", SHORT),
            "1 observation and token of another episode": (1, "shuffled", SHORT),
        },
    ),
    7: Study(
        400,
        Budget(every=1, steps=2000),
        True,
        {
            "stock, 1 observation": (1, None, None),
            "stock, 2 observations": (2, None, None),
            "1 observation and token, LAM fitted with the block's place": (1, "latest", PLACE),
            "1 observation and such a token of another episode": (1, "shuffled", PLACE),
            "1 observation and token, LAM of pixels alone": (1, "latest", PIXELS),
        },
    ),
}
STUDIES[13] = replace(
    STUDIES[7],
    conditions={
        "stock, 1 observation": (1, None, None),
        "1 observation and token, LAM of pixels and their flow": (1, "latest", OF_FLOW),
        "1 observation and such a token of another episode": (1, "shuffled", OF_FLOW),
    },
)
FEATURES = {
    IMAGE: {"dtype": "video", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]},
    STATE: {"dtype": "float32", "shape": (1,), "names": ["rest"]},
    ACTION: {"dtype": "float32", "shape": (1,), "names": ["x"]},
}


@dataclass(frozen=True)
class Ride:
    """One episode: the block's place at each frame, px."""

    middle: float
    speed: float
    rest: float

    @classmethod
    def drawn(cls, seed: int) -> "Ride":
        rng = np.random.default_rng(seed)
        return cls(rng.uniform(30, SIZE - 30), rng.uniform(-FASTEST, FASTEST), rng.uniform(-1, 1))

    def place(self, frame: int) -> float:
        return self.middle + self.speed * (frame - (LENGTH - 1) / 2)

    def picture(self, frame: int) -> np.ndarray:
        """(SIZE, SIZE, 3) uint8, edges smoothed to a hundredth of a pixel."""
        column = np.arange(SIZE)
        left, right = self.place(frame) - BLOCK / 2, self.place(frame) + BLOCK / 2
        covered = np.clip(np.minimum(column + 1, right) - np.maximum(column, left), 0, 1)
        picture = np.full((SIZE, SIZE, 3), 235.0)
        picture[56:72] = 110.0  # the belt
        block = slice(56 - BLOCK, 56)
        picture[block] += covered[None, :, None] * (np.array([200.0, 60.0, 50.0]) - picture[block])
        return picture.round().astype(np.uint8)

    def frames(self) -> list[dict[str, Any]]:
        return [
            {
                IMAGE: self.picture(frame),
                STATE: np.array([self.rest], np.float32),
                ACTION: np.array([self.place(frame + LEAD)], np.float32),
                "task": "grip the block",
            }
            for frame in range(LENGTH)
        ]


def record(root: Path, episodes: int) -> LeRobotDataset:
    if not root.exists():
        part = root.with_suffix(".part")
        with quiet_recording():
            dataset = LeRobotDataset.create("local/conveyor", FPS, FEATURES, root=part, video_backend="pyav")
            for seed in range(episodes):
                for frame in Ride.drawn(seed).frames():
                    dataset.add_frame(frame)
                dataset.save_episode()
            dataset.finalize()
        part.rename(root)
    return LeRobotDataset("local/conveyor", root=root, video_backend="pyav", return_uint8=True)


def strips(frames: Tensor) -> Tensor:
    """What the policy sees of pictures uint8 (F, 3, 96, 96): 6 × 48 grey pixels round the block, (F, 288)."""
    grey = frames[:, :, 40:64].float().mean(1, keepdim=True)
    return torch.nn.functional.avg_pool2d(grey, (4, 2)).flatten(1)


class OneScale(Recorded):
    """All pixels of the policy's input on the scale of the whole strip."""

    def _scale(self, key: str) -> tuple[Tensor, Tensor]:
        low, spread = super()._scale(key)
        if key != ENV:
            return low, spread
        return low.min(), (low + spread).max() - low.min()


def places(data: Recorded) -> Recorded:
    """The same recording with the block's place (F, 1) as its state: for the LAM, never for the policy."""
    rides = map(Ride.drawn, range(len(data.stop)))
    found = [ride.place(frame) for ride in rides for frame in range(LENGTH)]
    return replace(data, columns={**data.columns, STATE: torch.tensor(found)[:, None]})


def tokens_of(which: str | None, lam: LamChoice | None, data: Recorded, folder: Path) -> Tokens | None:
    if lam is None:
        return None
    how = {"folder": folder / "lams", "batch_size": LAM_BATCH, "preset": PRESET}
    tokens = lams.of_lam(lam, "vq", places(data), **how)
    return lams.of_other_episodes(tokens, data) if which == "shuffled" else tokens


def results_of(study: int, work_dir: Path) -> Results:
    return Results(work_dir / ("conveyor.jsonl" if study == 2 else f"conveyor_{study}.jsonl"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--study", type=int, choices=STUDIES, default=7)
    args = parser.parse_args(argv)
    study, folder = STUDIES[args.study], args.work_dir / f"conveyor_{args.study}"
    folder.mkdir(parents=True, exist_ok=True)
    data = load(record(folder / "data", study.train + HELD_OUT), folder, HELD_OUT)
    data.columns[ENV] = strips(data.frames)
    if study.one_scale:
        data = OneScale(data.columns, data.frames, data.episode, data.held_out)
    actions = data.columns[ACTION][data.train_frames]
    px = float(actions.max() - actions.min()) / 2  # of a normalised unit
    # The first frame of an episode has no motion yet, for no policy.
    frames = data.held_out_frames[data.held_out_frames % LENGTH > 0]
    results = results_of(args.study, args.work_dir)
    for seed in SEEDS:
        for name, (n_obs_steps, which, lam) in study.conditions.items():
            if results.has(name, seed):
                continue
            tokens = tokens_of(which, lam, data, folder)
            r2 = lams.probe_r2(tokens, places(data)) if tokens else None
            windows = Windows(data, n_obs_steps, study.budget.horizon, tokens, (0,))
            policy = train(windows, data.train_frames, study.budget, seed)
            found = errors(policy, windows, study.budget, frames)
            first = denoised(policy, windows, frames, replace(study.budget, noise_samples=1))[0, :, 0, 0]
            missed = px * (first - windows.columns[ACTION][frames, 0]).abs()
            count = int((missed <= GRIP).sum())
            results.add(condition=name, seed=seed, px=px, grips=count, n=len(frames), probe_r2=r2, **found)
            miss = px * np.mean(found["error"]) ** 0.5
            print(f"{name:<60} seed {seed}  misses by {miss:.1f} px, grips {count}/{len(frames)}", flush=True)


if __name__ == "__main__":
    main()
