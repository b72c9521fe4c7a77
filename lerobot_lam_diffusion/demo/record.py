"""Record the expert on PushT as a LeRobot dataset (v3, encoded video), shaped like `lerobot/pusht`.

    record_pusht(Path("data/pusht"), "local/pusht", num_episodes=20, near_goal=True)

Plans are made without rendering and replayed for the camera, so nothing is rendered for a plan that fails.
On 2 cores an episode near the goal (53 frames on average) takes 1 s, half of it planning; a standard one
(107) 2 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
from lerobot.datasets import LeRobotDataset
from tqdm import tqdm

from lerobot_lam_diffusion.demo.expert import Demonstration, plan_episode
from lerobot_lam_diffusion.demo.pusht import FPS, TASK, make_env
from lerobot_lam_diffusion.demo.quiet import quiet_recording
from lerobot_lam_diffusion.utils.files import refuse_existing, spread_mode, whole_or_nothing

IMAGE_KEY = "observation.image"
FEATURES = {
    IMAGE_KEY: {"dtype": "video", "shape": (96, 96, 3), "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
}


@dataclass
class RecordSummary:
    """What was recorded."""

    root: Path
    seeds: list[int] = field(default_factory=list)  # one an episode, in order
    failed_seeds: list[int] = field(default_factory=list)  # left out: the expert did not solve them
    num_frames: int = 0


def record_pusht(
    root: Path,
    repo_id: str,
    num_episodes: int,
    *,
    near_goal: bool,
    first_seed: int = 0,
    show_progress: bool = False,
) -> RecordSummary:
    """Record episodes that all solve the task, one a seed from `first_seed` upwards.

    Frame i holds the observation before action i. The dataset appears at `root` whole or not at all.

    Args:
        root: folder of the new dataset; must be empty or not exist.
        near_goal: short episodes that start with the block near the goal; else the environment's own starts.
        show_progress: a bar that counts the episodes.

    Raises:
        FileExistsError: `root` holds something already.
        RuntimeError: the expert fails far more often than it should.
    """
    refuse_existing(root, "--root")
    summary = RecordSummary(root)
    with quiet_recording() as terminal, whole_or_nothing(root) as partial:
        # The backend is for reading back only; naming it spares LeRobot's probe of torchcodec.
        dataset = LeRobotDataset.create(repo_id, FPS, FEATURES, root=partial, video_backend="pyav")
        try:
            plans = _plan(num_episodes, near_goal, first_seed, summary)
            bar = tqdm(
                plans, "record", num_episodes, unit="episode", disable=not show_progress, file=terminal
            )
            for demonstration in bar:
                for frame in replay(demonstration):
                    dataset.add_frame(frame)
                dataset.save_episode()
                summary.seeds.append(demonstration.seed)
                summary.num_frames += len(demonstration.actions)
        finally:
            # Also after a failure: left to LeRobot's __del__, it would write into the folder removed by then.
            dataset.finalize()
        spread_mode(partial)  # LeRobot's videos are private files
    return summary


def _plan(
    num_episodes: int, near_goal: bool, first_seed: int, summary: RecordSummary
) -> Iterator[Demonstration]:
    """Demonstrations of the next solved seeds, one at a time until `num_episodes` are recorded."""
    for seed in count(first_seed):
        if len(summary.seeds) == num_episodes:
            return
        demonstration = plan_episode(seed, near_goal=near_goal)
        if demonstration is not None:
            yield demonstration
            continue
        summary.failed_seeds.append(seed)
        if len(summary.failed_seeds) > 10 + num_episodes:
            raise RuntimeError(
                f"The expert solved {len(summary.seeds)} starts and failed on {len(summary.failed_seeds)}; "
                "with a working gym-pusht it solves nearly all. Check the versions of gym-pusht and pymunk."
            )


def replay(demonstration: Demonstration) -> Iterator[dict]:
    """Replay a demonstration for the camera: each observation with the action that follows it."""
    env = make_env(obs_type="pixels_agent_pos")
    observation, _ = env.reset(seed=demonstration.seed, options=demonstration.options)
    solved = False
    for action in demonstration.actions:
        yield {
            IMAGE_KEY: observation["pixels"],
            "observation.state": observation["agent_pos"].astype(np.float32),
            "action": action,
            "task": TASK,
        }
        observation, _, solved, _, _ = env.step(action)
    if not solved:
        raise RuntimeError(
            f"The replay of seed {demonstration.seed} did not solve the task although its plan did: the "
            "simulation is not deterministic here. Check the versions of gym-pusht and pymunk."
        )
