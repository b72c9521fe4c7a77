"""Trained policies act: with a video of another start as their guide, with controls, with altered videos."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors

from lerobot_lam_diffusion import DiffusionLamConfig, DiffusionLamPolicy
from lerobot_lam_diffusion.demo.pusht import FPS, block_pose
from lerobot_lam_diffusion.demo.record import IMAGE_KEY
from lerobot_lam_diffusion.policy.guidance import Guide, Track
from lerobot_lam_diffusion.tokens import TokenStore
from tests.benchmarks.study.statistics import wilson

from .demonstrations import ENV, MOVED, SIDES, STATE, Start, middle_of, pictures_of, seen, write_video
from .policies import small, store_of_videos, train

NEXT = list(range(1, 9))
PAST = list(range(-7, 1))
TICKS = 40
Row = tuple[str, str, int, dict[str, Any]]
"""Policy, guide, training seed, score."""


class Pilot:
    """A trained policy that acts in many environments at once."""

    def __init__(self, folder: Path, guidance: list[str] | None = None) -> None:
        config = DiffusionLamConfig.from_pretrained(folder)
        config.lam_missing, config.lam_guidance = "zero", guidance
        self.policy = DiffusionLamPolicy.from_pretrained(folder, config=config).eval()
        self.preprocess, self.postprocess = make_pre_post_processors(config, pretrained_path=str(folder))
        self.pictures = IMAGE_KEY in config.input_features

    def observed(self, envs: list[Any], observations: list[dict]) -> dict[str, Any]:
        """What the policy sees of environments, pre-processed."""
        parts = [seen(env) for env in envs]
        batch = {key: torch.from_numpy(np.stack([part[key] for part in parts])) for key in (STATE, ENV)}
        if self.pictures:
            del batch[ENV]
            pixels = np.stack([observation["pixels"] for observation in observations])
            batch[IMAGE_KEY] = small(torch.from_numpy(pixels).permute(0, 3, 1, 2)) / 255
        return self.preprocess(batch)

    def act(
        self, starts: list[Start], fed: Callable[[int], torch.Tensor] | None = None, seed: int = 0
    ) -> np.ndarray:
        """How far each block moved to the right, px `(B,)`.

        Args:
            fed: Tick → tokens `(B, k, n·a)` that the batch brings, instead of a guide.
        """
        torch.manual_seed(seed)
        self.policy.reset()
        worlds = [start.env(self.pictures) for start in starts]
        envs, observations = [env for env, _ in worlds], [first for _, first in worlds]
        before = np.stack([middle_of(block_pose(env)) for env in envs])
        for tick in range(TICKS):
            batch = self.observed(envs, observations)
            if fed is not None:
                batch[self.policy.config.lam_tokens_key] = fed(tick).to(self.policy.config.device)
            actions = self.postprocess(self.policy.select_action(batch)).numpy()
            observations = [
                env.step(np.clip(action, 0, 512))[0] for env, action in zip(envs, actions, strict=True)
            ]
        after = np.stack([middle_of(block_pose(env)) for env in envs])
        return (after - before)[:, 0]


@dataclass
class Trial:
    """Starts, each twice, and for each the video of another start that it is shown."""

    starts: list[Start]
    sides: list[str]
    videos: list[int]  # position among the sorted files

    @classmethod
    def drawn(cls, rollouts: int, files: list[Path]) -> "Trial":
        rng = np.random.default_rng(0)
        by_side = {side: [k for k, file in enumerate(files) if file.stem.startswith(side)] for side in SIDES}
        sides = [side for _ in range(rollouts // 2) for side in SIDES]
        starts = [Start.drawn(20_000 + k // 2) for k in range(len(sides))]
        return cls(starts, sides, [int(rng.choice(by_side[side])) for side in sides])

    def score(self, moved: np.ndarray) -> dict[str, Any]:
        way = moved * np.array([SIDES[side] for side in self.sides])
        follow, opposite = int((way > MOVED).sum()), int((way < -MOVED).sum())
        n = len(way)
        return {"n": n, "follow": follow / n, "interval": wilson(follow, n)[1:], "opposite": opposite / n}


def tracks_of(store: Path) -> list[torch.Tensor]:
    """Tokens of each episode `(T, n·a)`."""
    opened = TokenStore.open(store)
    return [
        opened.window(torch.arange(int(a), int(b)), [0])[:, 0]
        for a, b in zip(opened.episode_from, opened.episode_to, strict=True)
    ]


def shuffled(tracks: list[torch.Tensor], trial: Trial) -> Guide:
    """Each right video's tokens in another order."""
    generator = torch.Generator().manual_seed(1)
    return Guide(
        [
            Track(f"shuffled {k}", tracks[v][torch.randperm(len(tracks[v]), generator=generator)])
            for k, v in enumerate(trial.videos)
        ]
    )


def of_random_frames(tracks: list[torch.Tensor], trial: Trial) -> Guide:
    """Tokens of random frames of all the videos."""
    generator, pool = torch.Generator().manual_seed(2), torch.cat([track[1:] for track in tracks])
    return Guide(
        [
            Track(f"random {k}", pool[torch.randint(len(pool), (len(tracks[v]),), generator=generator)])
            for k, v in enumerate(trial.videos)
        ]
    )


def main_conditions(work_dir: Path, args: argparse.Namespace, trial: Trial, store: Path) -> Iterator[Row]:
    """Results, as they come."""
    tracks = tracks_of(store)
    guidance = [f"{store}#{video}" for video in trial.videos]
    for seed in range(args.seeds):
        pilot = Pilot(train(work_dir, args, NEXT, seed), guidance)
        name = "next 8 (+1 … +8)"
        yield name, "video of another start", seed, trial.score(pilot.act(trial.starts))
        for shown, guide in {
            "none: its habit": None,
            "control: random frames' tokens": of_random_frames(tracks, trial),
            "control: that video's tokens, shuffled": shuffled(tracks, trial),
        }.items():
            pilot.policy.rollout.guide = guide
            yield name, shown, seed, trial.score(pilot.act(trial.starts))
    for seed in range(args.seeds):
        pilot = Pilot(train(work_dir, args, PAST, seed))
        ahead = Guide([Track(f"video {k}", tracks[v]) for k, v in enumerate(trial.videos)])
        fed = lambda tick, ahead=ahead: ahead.window(tick, NEXT, len(trial.starts))  # noqa: E731
        yield "past 8 (-7 … 0)", "mismatch: the next 8", seed, trial.score(pilot.act(trial.starts, fed))


def robustness(work_dir: Path, args: argparse.Namespace, trial: Trial, store: Path) -> Iterator[Row]:
    """The same policy, and what may happen to a video."""
    tracks, policy = tracks_of(store), train(work_dir, args, NEXT, 0)
    empty = torch.zeros(8, tracks[0].shape[1])
    changed: dict[str, list[torch.Tensor]] = {}
    for ticks in (4, 8):
        changed[f"{ticks} ticks early"] = [track[ticks:] for track in tracks]
        changed[f"{ticks} ticks late"] = [torch.cat([empty[:ticks], track]) for track in tracks]
    videos = work_dir / "videos"
    for change, fps in {"every second frame": FPS // 2, "each frame twice": FPS * 2}.items():
        changed[f"wrong fps: {change}"] = tracks_of(store_of_videos(videos, work_dir / f"at_{fps}_fps", fps))
    looks: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "grey": lambda x: np.repeat(x.mean(-1, keepdims=True).astype(np.uint8), 3, -1),
        "red and blue swapped": lambda x: x[..., ::-1],
        "colours inverted": lambda x: 255 - x,
        "four times larger": lambda x: x.repeat(4, 0).repeat(4, 1),
    }
    for change, look in looks.items():
        folder = work_dir / f"videos_{change.replace(' ', '_')}"
        if not folder.exists():
            part = folder.with_suffix(".part")
            part.mkdir(exist_ok=True)
            for file in sorted(videos.iterdir()):
                write_video(part / file.name, [look(picture) for picture in pictures_of(file)])
            part.rename(folder)
        changed[change] = tracks_of(store_of_videos(folder, work_dir / f"store_{folder.name}"))
    pilot = Pilot(policy)
    for change, altered in changed.items():
        pilot.policy.rollout.guide = Guide(
            [Track(f"{change} {k}", altered[v]) for k, v in enumerate(trial.videos)]
        )
        same = np.mean(
            [
                (a[1 : len(b)] == b[1 : len(a)]).all(-1).float().mean().item() if len(a) == len(b) else np.nan
                for a, b in zip(altered, tracks, strict=True)
            ]
        )
        score = trial.score(pilot.act(trial.starts)) | ({} if np.isnan(same) else {"same_tokens": same})
        yield "next 8 (+1 … +8)", change, 0, score
