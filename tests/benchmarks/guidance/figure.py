"""The same start, two videos, two behaviours: a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from lerobot_lam_diffusion.demo.pusht import block_pose
from lerobot_lam_diffusion.policy.guidance import Guide, Track

from .demonstrations import MOVED, SIDES, Start, middle_of, pictures_of
from .trial import Pilot, Trial, tracks_of


def draw(path: Path, folder: Path, trial: Trial, store: Path, files: list[Path]) -> None:
    """The same start, two videos, two behaviours."""
    pilot = Pilot(folder)
    tracks, films = tracks_of(store), {}
    for number in range(0, len(trial.starts), 2):  # the first start from which it follows both
        follows = []
        for side, video in list(zip(trial.sides, trial.videos, strict=True))[number : number + 2]:
            pilot.policy.rollout.guide = Guide([Track(side, tracks[video])])
            acted, moved = film(pilot, trial.starts[number], len(tracks[video]))
            films[side] = pictures_of(files[video]), acted
            follows.append(moved * SIDES[side] > MOVED)
        if all(follows):
            break
    figure, axes = plt.subplots(2, 6, figsize=(9.6, 3.5))
    titles = ["video: starts", "60 %", "ends", "rollout: starts", "60 %", "as the video ends"]
    for row, (side, shown) in zip(axes, films.items(), strict=True):
        cells = [pictures[int(part * (len(pictures) - 1))] for pictures in shown for part in (0, 0.6, 1)]
        for cell, picture, title in zip(row, cells, titles, strict=True):
            cell.imshow(picture)
            cell.set_xticks([])
            cell.set_yticks([])
            if side == "left":
                cell.set_title(title, fontsize=9)
        row[0].set_ylabel(f"shown: {side}", fontsize=9)
        for cell in row[3:]:
            for spine in cell.spines.values():
                spine.set_edgecolor("tab:blue")
                spine.set_linewidth(2)
    figure.suptitle("One policy, one start (blue), two demonstrations of other starts", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def film(pilot: Pilot, start: Start, ticks: int) -> tuple[list[np.ndarray], float]:
    """Pictures of a rollout, and how far the block moved to the right."""
    torch.manual_seed(0)
    pilot.policy.reset()
    env, observation = start.env(pictures=True)
    pictures, before = [observation["pixels"]], middle_of(block_pose(env))
    for _ in range(ticks):
        batch = pilot.observed([env], [observation])
        action = pilot.postprocess(pilot.policy.select_action(batch)).numpy()[0]
        observation, *_ = env.step(np.clip(action, 0, 512))
        pictures.append(observation["pixels"])
    return pictures, float((middle_of(block_pose(env)) - before)[0])
