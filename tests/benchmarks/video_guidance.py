r"""Show it a video: does a policy that was trained on what comes next do what a demonstration shows?

    python tests/benchmarks/video_guidance.py --work_dir=/tmp/guidance --picture=guidance.png
    python tests/benchmarks/video_guidance.py --work_dir=/tmp/guidance --robustness
    python tests/benchmarks/video_guidance.py --work_dir=/tmp/guidance --observations=pixels --steps=3000 \
        --device=cuda

PushT, the block near the middle at any angle, the agent below it. The same starts are demonstrated twice: the
agent walks round the block and pushes it left, or right. Nothing but the tokens of the next frames tells the
two apart. Each trained policy then acts from starts that it has not seen, with held-out demonstrations of
*other* starts as guides, once a push to the left and once to the right; it follows if the block moves more
than 25 px the video's way. Controls: no guide (its habit), tokens of random frames of all those videos, the
right video's tokens in another order; and a policy that was trained on the eight past tokens and is fed the
next eight.

About 15 minutes on one core; with pixels hours, or about 12 minutes on a GPU. What is finished in
`work_dir` is not done again.
"""

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SVT_LOG", "1")

import av
import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors

from lerobot_lam_diffusion import DiffusionLamConfig, DiffusionLamPolicy
from lerobot_lam_diffusion.demo import tee, walk
from lerobot_lam_diffusion.demo.console import output_to
from lerobot_lam_diffusion.demo.pushes import PushSimulation
from lerobot_lam_diffusion.demo.pusht import FPS, Pose, agent_position, block_pose, make_env, reset_options
from lerobot_lam_diffusion.demo.record import IMAGE_KEY
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.policy.guidance import Guide, Track, open_guide
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.scripts.precompute_lam_tokens import main as precompute_command
from lerobot_lam_diffusion.tokens import TokenStore

LAM = "pusht-compact"
NEXT = list(range(1, 9))
PAST = list(range(-7, 1))
SIDES = {"left": -1.0, "right": 1.0}
MOVED = 25.0  # px that count as a push
TICKS = 40
LONGEST = 48  # frames of a demonstration
STATE, ENV, ACTION = "observation.state", "observation.environment_state", "action"
DESCRIBED = {"names": None}
FEATURES = {
    IMAGE_KEY: {"dtype": "video", "shape": (96, 96, 3), "names": ["height", "width", "channels"]},
    STATE: {"dtype": "float32", "shape": (2,), **DESCRIBED},
    ENV: {"dtype": "float32", "shape": (4,), **DESCRIBED},
    ACTION: {"dtype": "float32", "shape": (2,), **DESCRIBED},
}
PIXELS = 48  # side of the pixel policy's picture


@dataclass
class Start:
    agent: np.ndarray
    pose: Pose

    @classmethod
    def drawn(cls, seed: int) -> "Start":
        rng = np.random.default_rng(seed)
        pose = Pose(*rng.uniform(216, 296, 2), rng.uniform(0, 2 * math.pi))
        middle = middle_of(pose)
        while True:
            agent = middle + np.array([rng.uniform(-40, 40), rng.uniform(110, 170)])
            if tee.distance(pose, agent) > 40 and (agent < 490).all():
                return cls(agent, pose)

    def env(self, pictures: bool) -> tuple[Any, dict]:
        env = make_env("pixels_agent_pos" if pictures else "state")
        observation, _ = env.reset(seed=0, options=reset_options(self.agent, self.pose))
        return env, observation


def middle_of(pose: Pose) -> np.ndarray:
    """Centre of the block."""
    return tee.corner_positions(np.array([pose]))[0].mean(0)


def seen(env: Any) -> dict[str, np.ndarray]:
    """Agent, and the block's place and angle, which LeRobot does not normalise, on the scale of -1 to 1."""
    pose = block_pose(env)
    place = [pose.x / 256 - 1, pose.y / 256 - 1, math.cos(pose.angle), math.sin(pose.angle)]
    return {STATE: agent_position(env).astype(np.float32), ENV: np.array(place, np.float32)}


def demonstrate(start: Start, side: str, seed: int) -> tuple[list[dict[str, np.ndarray]], float]:
    """Frames of one push, and how far the block moved that way."""
    direction = np.array([SIDES[side], 0.0])
    contact = best_contact(start.pose, direction, seed)
    env, observation = start.env(pictures=True)
    pursuit = walk.PurePursuit(start.agent, walk.plan_way(start.pose, start.agent, contact))
    before, frames, pushing = middle_of(block_pose(env)), [], False
    while len(frames) < LONGEST:
        agent = agent_position(env)
        pushing = pushing or (pursuit.aims_at_end and np.linalg.norm(agent - contact) < 14)
        action = agent + 40 * direction if pushing else pursuit.target(agent)
        action = np.clip(action, 4, 508).astype(np.float32)
        frames.append({IMAGE_KEY: observation["pixels"], **seen(env), ACTION: action})
        observation, *_ = env.step(action)
        moved = float((middle_of(block_pose(env)) - before) @ direction)
        if pushing and moved > 70:
            break
    return frames, moved


def best_contact(pose: Pose, direction: np.ndarray, seed: int) -> np.ndarray:
    """Where a straight push moves the block farthest that way."""
    simulation = PushSimulation()
    spots = tee.contacts(pose, 40, offset=np.random.default_rng(seed).uniform())
    best, farthest = None, -math.inf
    for position, normal in zip(*spots, strict=True):
        if normal @ direction < 0.3:
            continue
        poses = simulation.roll_out(pose, position, direction, 60.0)
        way = middle_of(Pose(*poses[-1])) - middle_of(pose)
        gain = float(way @ direction) - 0.5 * abs(float(way[1]))
        if gain > farthest:
            best, farthest = position, gain
    assert best is not None
    return best


def record(work_dir: Path, train: int, held_out: int) -> None:
    """The training dataset, and the held-out demonstrations as one video file each."""
    root, videos = work_dir / "data", work_dir / "videos"
    if not root.exists():
        with output_to(work_dir / "record.log"):
            dataset = LeRobotDataset.create(
                "local/both_ways", FPS, FEATURES, root=work_dir / "data.part", video_backend="pyav"
            )
            for seed in range(train):
                for side in SIDES:
                    frames, moved = demonstrate(Start.drawn(seed), side, seed)
                    if moved > MOVED:
                        for frame in frames:
                            dataset.add_frame({**frame, "task": "push the block"})
                        dataset.save_episode()
            dataset.finalize()
            (work_dir / "data.part").rename(root)
    if not videos.exists():
        part = work_dir / "videos.part"
        part.mkdir(exist_ok=True)
        for seed in range(10_000, 10_000 + held_out):
            for side in SIDES:
                frames, moved = demonstrate(Start.drawn(seed), side, seed)
                if moved > MOVED:
                    write_video(part / f"{side}_{seed}.mp4", [frame[IMAGE_KEY] for frame in frames])
        part.rename(videos)


def write_video(path: Path, pictures: list[np.ndarray], fps: int = FPS) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))))
        container.mux(stream.encode(None))


def store_of_videos(videos: Path, store: Path, fps: int = FPS) -> Path:
    """The videos' tokens, by the command that a user would run."""
    if not store.exists():
        precompute_command(
            [
                f"--videos={videos}",
                f"--fps={fps}",
                f"--lam.path={LAM}",
                f"--output_dir={store}",
                "--device=cpu",
            ]
        )
    return store


def training_tokens(work_dir: Path) -> Path:
    if not (work_dir / "tokens").exists():
        data = LeRobotDataset(
            "local/both_ways", root=work_dir / "data", video_backend="pyav", return_uint8=True
        )
        precompute_tokens(
            data, load_lam(LAM), work_dir / "tokens", camera_key=IMAGE_KEY, lam_path=LAM, show_progress=False
        )
    return work_dir / "tokens"


class Batches:
    """Training batches out of memory, windows cut as LeRobot cuts them; tokens are joined by the policy."""

    def __init__(self, data: LeRobotDataset, config: DiffusionLamConfig) -> None:
        columns = [key for key in (STATE, ENV, ACTION) if key in {*config.input_features, ACTION}]
        table = data.hf_dataset.with_format("torch").select_columns([*columns, "episode_index"])
        self.columns = {key: torch.stack(list(table[key])).float() for key in columns}
        if IMAGE_KEY in config.input_features:
            self.columns[IMAGE_KEY] = torch.cat([small(data[i][IMAGE_KEY][None]) for i in range(len(data))])
        episode = torch.stack(list(table["episode_index"]))
        starts = torch.tensor(data.meta.episodes["dataset_from_index"])
        stops = torch.tensor(data.meta.episodes["dataset_to_index"])
        self.first, self.last = starts[episode], stops[episode] - 1
        self.deltas = {
            key: config.action_delta_indices if key == ACTION else config.observation_delta_indices
            for key in self.columns
        }

    def draw(self, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        index = torch.randint(len(self.first), (size,), generator=generator)
        batch = {"index": index}
        for key, values in self.columns.items():
            wanted = index[:, None] + torch.tensor(self.deltas[key])
            frames = wanted.clamp(self.first[index, None], self.last[index, None])
            batch[key] = values[frames] / 255 if key == IMAGE_KEY else values[frames]
            batch[f"{key}_is_pad"] = frames != wanted
        return batch


def small(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 `(B, 3, H, W)` at the pixel policy's size."""
    size = (PIXELS, PIXELS)
    return torch.nn.functional.interpolate(pictures.float(), size, mode="area").round().to(torch.uint8)


def fields(observations: str, device: str, store: Path, offsets: list[int]) -> dict[str, Any]:
    inputs = {STATE: PolicyFeature(FeatureType.STATE, (2,))}
    if observations == "pixels":
        inputs[IMAGE_KEY] = PolicyFeature(FeatureType.VISUAL, (3, PIXELS, PIXELS))
    else:
        inputs[ENV] = PolicyFeature(FeatureType.ENV, (4,))
    return {
        "input_features": inputs,
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
        "device": device, "push_to_hub": False, "pretrained_backbone_weights": None, "crop_shape": None,
        "down_dims": (64, 128), "horizon": 16, "n_action_steps": 8, "spatial_softmax_num_keypoints": 16,
        "noise_scheduler_type": "DDIM", "num_inference_steps": 10,
        "use_precomputed_lam_tokens": True, "lam_tokens_path": str(store),
        "lam_token_offsets": offsets, "lam_token_dropout": 0.5,
    }  # fmt: skip


def train(work_dir: Path, args: argparse.Namespace, offsets: list[int], seed: int) -> Path:
    """A trained policy's folder."""
    name = f"{args.observations}_{offsets[0]:+d}to{offsets[-1]:+d}_seed{seed}_{args.steps}"
    folder = work_dir / "policies" / name
    if folder.exists():
        return folder
    started = time.perf_counter()
    data = LeRobotDataset("local/both_ways", root=work_dir / "data", video_backend="pyav", return_uint8=True)
    config = DiffusionLamConfig(**fields(args.observations, args.device, training_tokens(work_dir), offsets))
    torch.manual_seed(seed)
    policy = make_policy(config, ds_meta=data.meta).train()
    preprocess, postprocess = make_pre_post_processors(config, dataset_stats=data.meta.stats)
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-4, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.steps)
    batches, generator = Batches(data, config), torch.Generator().manual_seed(seed)
    size = 32 if args.observations == "pixels" else 64
    for step in range(args.steps):
        loss, _ = policy.forward(preprocess(batches.draw(size, generator)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0 or step == args.steps - 1:
            print(
                f"{name} step {step} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True
            )
    policy.save_pretrained(folder)
    preprocess.save_pretrained(folder)
    postprocess.save_pretrained(folder)
    return folder


class Pilot:
    """A trained policy that acts in many environments at once."""

    def __init__(self, folder: Path, guidance: list[str] | None = None) -> None:
        config = DiffusionLamConfig.from_pretrained(folder)
        config.lam_missing, config.lam_guidance = "zero", guidance
        self.policy = DiffusionLamPolicy.from_pretrained(folder, config=config).eval()
        self.preprocess, self.postprocess = make_pre_post_processors(config, pretrained_path=str(folder))
        self.pictures = IMAGE_KEY in config.input_features

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
            parts = [seen(env) for env in envs]
            batch = {key: torch.from_numpy(np.stack([part[key] for part in parts])) for key in (STATE, ENV)}
            if self.pictures:
                del batch[ENV]
                pixels = np.stack([observation["pixels"] for observation in observations])
                batch[IMAGE_KEY] = small(torch.from_numpy(pixels).permute(0, 3, 1, 2)) / 255
            batch = self.preprocess(batch)
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
        return {"n": n, "follow": follow / n, "interval": wilson(follow, n), "opposite": opposite / n}


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, p = 1.96, count / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


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


def main_conditions(
    work_dir: Path, args: argparse.Namespace, trial: Trial, store: Path
) -> Iterator[tuple[str, str, int, dict]]:
    """(policy, guide, training seed, score), as they come."""
    tracks = tracks_of(store)
    guidance = [f"{store}#{video}" for video in trial.videos]
    for seed in range(args.seeds):
        pilot = Pilot(train(work_dir, args, NEXT, seed), guidance)
        name = "next 8 (+1 … +8)"
        yield name, "video of another start", seed, trial.score(pilot.act(trial.starts))
        for told, guide in {
            "none: its habit": None,
            "control: random frames' tokens": of_random_frames(tracks, trial),
            "control: that video's tokens, shuffled": shuffled(tracks, trial),
        }.items():
            pilot.policy.guide = guide
            yield name, told, seed, trial.score(pilot.act(trial.starts))
    for seed in range(args.seeds):
        pilot = Pilot(train(work_dir, args, PAST, seed))
        ahead = Guide([Track(f"video {k}", tracks[v]) for k, v in enumerate(trial.videos)])
        fed = lambda tick, ahead=ahead: ahead.window(tick, NEXT, len(trial.starts))  # noqa: E731
        yield "past 8 (-7 … 0)", "mismatch: the next 8", seed, trial.score(pilot.act(trial.starts, fed))


def robustness(
    work_dir: Path, args: argparse.Namespace, trial: Trial, store: Path
) -> Iterator[tuple[str, str, int, dict]]:
    """The same policy, and what may happen to a video."""
    tracks, policy = tracks_of(store), train(work_dir, args, NEXT, 0)
    empty = torch.zeros(8, tracks[0].shape[1])
    changed: dict[str, list[torch.Tensor]] = {}
    for ticks in (4, 8):
        changed[f"{ticks} ticks early"] = [track[ticks:] for track in tracks]
        changed[f"{ticks} ticks late"] = [torch.cat([empty[:ticks], track]) for track in tracks]
    videos = work_dir / "videos"
    for told, fps in {"every second frame": FPS // 2, "each frame twice": FPS * 2}.items():
        changed[f"wrong fps: {told}"] = tracks_of(store_of_videos(videos, work_dir / f"at_{fps}_fps", fps))
    looks: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "grey": lambda x: np.repeat(x.mean(-1, keepdims=True).astype(np.uint8), 3, -1),
        "red and blue swapped": lambda x: x[..., ::-1],
        "colours inverted": lambda x: 255 - x,
        "four times larger": lambda x: x.repeat(4, 0).repeat(4, 1),
    }
    for told, look in looks.items():
        folder = work_dir / f"videos_{told.replace(' ', '_')}"
        if not folder.exists():
            part = folder.with_suffix(".part")
            part.mkdir(exist_ok=True)
            for file in sorted(videos.iterdir()):
                write_video(part / file.name, [look(picture) for picture in pictures_of(file)])
            part.rename(folder)
        changed[told] = tracks_of(store_of_videos(folder, work_dir / f"store_{folder.name}"))
    pilot = Pilot(policy)
    for told, altered in changed.items():
        pilot.policy.guide = Guide([Track(f"{told} {k}", altered[v]) for k, v in enumerate(trial.videos)])
        same = np.mean(
            [
                (a[1 : len(b)] == b[1 : len(a)]).all(-1).float().mean().item() if len(a) == len(b) else np.nan
                for a, b in zip(altered, tracks, strict=True)
            ]
        )
        score = trial.score(pilot.act(trial.starts)) | ({} if np.isnan(same) else {"same_tokens": same})
        yield "next 8 (+1 … +8)", told, 0, score


def pictures_of(file: Path) -> list[np.ndarray]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def acceptance(rows: list[tuple[str, str, int, dict]]) -> list[str]:
    """What is not as it has to be."""
    problems = []
    for policy, guide, seed, score in rows:
        follow = score["follow"]
        if guide == "video of another start" and follow < 0.80:
            problems.append(f"seed {seed}: follows its video in {follow:.2f}, expected at least 0.80")
        if guide.startswith(("none", "control")) and not 0.30 <= follow <= 0.55:
            problems.append(f"seed {seed}, {guide}: {follow:.2f}, expected 0.30 to 0.55")
        if guide.startswith("mismatch") and follow > 0.70:
            problems.append(f"seed {seed}, {policy}, {guide}: {follow:.2f}, expected at most 0.70")
    return problems


def same_as_the_videos(store: Path, files: list[Path], folder: Path) -> None:
    """A store's episode and its video guide alike, bit for bit."""
    config = DiffusionLamConfig.from_pretrained(folder)
    config.lam_guidance = [str(files[0]), str(files[-1]), f"{store}#0", f"{store}#{len(files) - 1}"]
    tracks = [track.tokens for track in open_guide(config).tracks]
    assert torch.equal(tracks[0], tracks[2])
    assert torch.equal(tracks[1], tracks[3])
    last = len(files) - 1
    print(f"{files[0].name} and {files[-1].name} guide as {store.name}#0 and #{last}: equal bit for bit")


def draw(path: Path, folder: Path, trial: Trial, store: Path, files: list[Path]) -> None:
    """The same start, two videos, two behaviours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pilot = Pilot(folder)
    tracks, films = tracks_of(store), {}
    for number in range(0, len(trial.starts), 2):  # the first start from which it follows both
        follows = []
        for side, video in list(zip(trial.sides, trial.videos, strict=True))[number : number + 2]:
            pilot.policy.guide = Guide([Track(side, tracks[video])])
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
        batch = {key: torch.from_numpy(value)[None] for key, value in seen(env).items()}
        if pilot.pictures:
            del batch[ENV]
            pixels = torch.from_numpy(observation["pixels"][None]).permute(0, 3, 1, 2)
            batch[IMAGE_KEY] = small(pixels) / 255
        action = pilot.postprocess(pilot.policy.select_action(pilot.preprocess(batch))).numpy()[0]
        observation, *_ = env.step(np.clip(action, 0, 512))
        pictures.append(observation["pixels"])
    return pictures, float((middle_of(block_pose(env)) - before)[0])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="keeps what is finished between runs")
    parser.add_argument("--observations", choices=["state", "pixels"], default="state", help="of the policy")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--device", default="cpu", help="of the policies; the LAM runs on the CPU")
    parser.add_argument("--seeds", type=int, default=2, help="training seeds")
    parser.add_argument("--rollouts", type=int, default=112)
    parser.add_argument("--starts", type=int, default=100, help="demonstrated twice for training")
    parser.add_argument("--held_out", type=int, default=30, help="demonstrated twice, for videos")
    parser.add_argument("--robustness", action="store_true", help="timing, speed and looks of the video")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    av.logging.set_level(av.logging.ERROR)
    logging.getLogger("lerobot_lam_diffusion.policy.guidance").setLevel(logging.ERROR)  # 112 videos end
    record(args.work_dir, args.starts, args.held_out)
    print(f"recorded after {time.perf_counter() - started:.0f} s", flush=True)
    training_tokens(args.work_dir)
    store = store_of_videos(args.work_dir / "videos", args.work_dir / "videos_lam")
    print(f"tokens after {time.perf_counter() - started:.0f} s", flush=True)
    files = sorted((args.work_dir / "videos").iterdir())
    trial = Trial.drawn(args.rollouts, files)
    rows = []
    conditions = robustness if args.robustness else main_conditions
    for row in conditions(args.work_dir, args, trial, store):
        policy, guide, seed, score = row
        rows.append(row)
        low, high = score["interval"]
        same = f", {score['same_tokens']:.0%} of tokens the same" if "same_tokens" in score else ""
        print(
            f"{policy:<18}{guide:<40}seed {seed}  follow {score['follow']:.3f} [{low:.2f}, {high:.2f}]  "
            f"opposite {score['opposite']:.3f}  n {score['n']}{same}",
            flush=True,
        )
    result = args.work_dir / f"result_{args.observations}{'_robustness' if args.robustness else ''}.json"
    result.write_text(json.dumps(rows, indent=1))
    folder = train(args.work_dir, args, NEXT, 0)
    same_as_the_videos(store, files, folder)
    if args.picture is not None:
        draw(args.picture, folder, trial, store, files)
    print(f"{time.perf_counter() - started:.0f} s in all")
    problems = [] if args.robustness else acceptance(rows)
    raise SystemExit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
