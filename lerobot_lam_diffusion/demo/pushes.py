"""Push planner: try many straight pushes in a private simulation, keep the one that ends nearest the goal.

Greedy, one push deep: on PushT that is enough as long as each push starts from where the agent really stands
(see `expert.py`). Nothing here touches the environment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pymunk

from lerobot_lam_diffusion.demo import tee, walk
from lerobot_lam_diffusion.demo.pusht import AGENT_RADIUS, ARENA_SIZE, Pose, PushTEnv, rotate

NEAR_ERROR = 30.0  # px: below it pushes are tried more finely
_ANGLES = (-0.5, -0.25, 0.0, 0.25, 0.5)  # push directions against the surface normal
_DIRECTIONS_FROM_HERE = 48
_MARGIN = 12.0  # px: the agent stays this far inside the arena
_MIN_DISTANCE = 3.0
_MIN_GAIN = 0.05  # px of error that a push must gain to be worth anything
_WALK_PRICE = 0.02  # px of error per px of way round the block


@dataclass(frozen=True)
class Push:
    """One straight push: the agent goes from `start` `distance` px along `direction`."""

    start: np.ndarray  # (2,)
    direction: np.ndarray  # (2,) unit vector
    distance: float
    error: float  # px, predicted goal error after it

    @property
    def end(self) -> np.ndarray:
        return self.start + self.direction * self.distance


class PushSimulation:
    """A private PushT physics in which any push can be tried from any pose."""

    TIME_STEP = 0.01  # s, the environment's
    STRIDE = 1.0  # px the agent moves per time step

    def __init__(self) -> None:
        self._space = pymunk.Space()
        self._space.damping = 0.0  # as in the environment: nothing glides on
        low, high = 5, 506
        corners = [(low, low), (high, low), (high, high), (low, high)]
        for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
            self._space.add(PushTEnv.add_segment(self._space, a, b, 2))
        self._agent = PushTEnv.add_circle(self._space, (256, 400), AGENT_RADIUS)
        self._block, _ = PushTEnv.add_tee(self._space, (256, 300), 0)

    def roll_out(self, pose: Pose, start: np.ndarray, direction: np.ndarray, distance: float) -> np.ndarray:
        """Simulate a push: poses `(T, 3)` of the block after the agent has moved 1, 2, ... px."""
        block, agent = self._block, self._agent
        self._forget()
        block.velocity, block.angular_velocity = (0, 0), 0
        block.angle = pose.angle  # before the position: turning is about the centre of gravity
        block.position = (pose.x, pose.y)
        agent.position = (float(start[0]), float(start[1]))
        agent.velocity = tuple(direction * (self.STRIDE / self.TIME_STEP))
        poses = []
        for _ in range(int(distance / self.STRIDE)):
            self._space.step(self.TIME_STEP)
            poses.append((*block.position, block.angle))
        return np.array(poses).reshape(-1, 3)

    def _forget(self) -> None:
        """Clear the last push's contacts, whose forces would otherwise affect this one (by up to 1 px)."""
        self._block.position, self._agent.position = (256, 256), (-500, -500)
        self._agent.velocity = (0, 0)
        for _ in range(self._space.collision_persistence + 1):
            self._space.step(self.TIME_STEP)


class PushPlanner:
    """Finds the next push. `rng` shifts the tried contacts, so that a failed plan is not tried again."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._simulation = PushSimulation()

    def best_push(self, pose: Pose, agent: np.ndarray) -> Push | None:
        """The best push from anywhere round the block; None where no tried push helps."""
        near = tee.goal_error(pose) < NEAR_ERROR
        candidates = list(self._pushes_around(pose, count=70 if near else 40))
        if tee.distance(pose, agent) < AGENT_RADIUS + 4:
            candidates += self._pushes_from(agent)
        return self._best(pose, agent, candidates)

    def best_push_from(self, pose: Pose, agent: np.ndarray) -> Push | None:
        """The best push from where the agent stands."""
        return self._best(pose, agent, list(self._pushes_from(agent)))

    def _pushes_around(self, pose: Pose, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        spots = tee.contacts(pose, count, offset=self._rng.uniform())
        for position, normal in zip(*spots, strict=True):
            if (position >= _MARGIN).all() and (position <= ARENA_SIZE - _MARGIN).all():
                yield from ((position, rotate(normal, angle)) for angle in _ANGLES)

    def _pushes_from(self, agent: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        turn = self._rng.uniform(0, 2 * math.pi)
        for k in range(_DIRECTIONS_FROM_HERE):
            angle = turn + 2 * math.pi * k / _DIRECTIONS_FROM_HERE
            yield agent, np.array([math.cos(angle), math.sin(angle)])

    def _best(
        self, pose: Pose, agent: np.ndarray, candidates: list[tuple[np.ndarray, np.ndarray]]
    ) -> Push | None:
        error = tee.goal_error(pose)
        reach = 45.0 if error < NEAR_ERROR else 120.0
        # Near the goal a long way round is worth it: the price fades with the error.
        price = _WALK_PRICE * min(1.0, error / NEAR_ERROR)
        ring = walk.Ring(pose)
        best, best_score = None, math.inf
        for start, direction in candidates:
            distance = min(reach, _distance_to_wall(start, direction))
            if distance < _MIN_DISTANCE:
                continue
            errors = tee.goal_errors(self._simulation.roll_out(pose, start, direction, distance))
            stop = int(errors.argmin())
            score = errors[stop] + price * ring.way_length(agent, start)
            if errors[stop] < error - _MIN_GAIN and score < best_score:
                best_score = score
                best = Push(start, direction, (stop + 1) * PushSimulation.STRIDE, float(errors[stop]))
        return best


def _distance_to_wall(start: np.ndarray, direction: np.ndarray) -> float:
    """How far the agent can go and stay inside the arena's margin."""
    wall = np.where(direction > 0, ARENA_SIZE - _MARGIN, _MARGIN)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nanmin((wall - start) / direction))
