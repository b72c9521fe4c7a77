"""The same starts demonstrated twice, a push to the left and one to the right: a dataset, and videos."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.demo import tee, walk
from lerobot_lam_diffusion.demo.pushes import PushSimulation
from lerobot_lam_diffusion.demo.pusht import FPS, Pose, agent_position, block_pose, make_env, reset_options
from lerobot_lam_diffusion.demo.quiet import quiet_recording
from lerobot_lam_diffusion.demo.record import IMAGE_KEY

SIDES = {"left": -1.0, "right": 1.0}
MOVED = 25.0  # px that count as a push
LONGEST = 48  # frames of a demonstration
STATE, ENV, ACTION = "observation.state", "observation.environment_state", "action"
DESCRIBED = {"names": None}
FEATURES = {
    IMAGE_KEY: {"dtype": "video", "shape": (96, 96, 3), "names": ["height", "width", "channels"]},
    STATE: {"dtype": "float32", "shape": (2,), **DESCRIBED},
    ENV: {"dtype": "float32", "shape": (4,), **DESCRIBED},
    ACTION: {"dtype": "float32", "shape": (2,), **DESCRIBED},
}


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
        with quiet_recording():
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


def opened(work_dir: Path) -> LeRobotDataset:
    """The recorded dataset."""
    return LeRobotDataset("local/both_ways", root=work_dir / "data", video_backend="pyav", return_uint8=True)


def write_video(path: Path, pictures: list[np.ndarray], fps: int = FPS) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))))
        container.mux(stream.encode(None))


def pictures_of(file: Path) -> list[np.ndarray]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
