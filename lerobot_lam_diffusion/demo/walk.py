"""Walking round the block without touching it: the way to a push's start, and how to follow it."""

from __future__ import annotations

import numpy as np
import shapely
from shapely.geometry import LineString, Point

from lerobot_lam_diffusion.demo import tee
from lerobot_lam_diffusion.demo.pusht import AGENT_RADIUS, ARENA_SIZE, Pose

_CLEARANCES = (9.0, 4.0)  # px of air on the way round: wide, or narrow where the wall is near
_SPACING = 12.0  # px between way-points
LOOK_AHEAD = 34.0  # px


class Ring:
    """The block's outline grown by the agent's radius and some clearance: the road round the block."""

    def __init__(self, pose: Pose, clearance: float = _CLEARANCES[0]) -> None:
        self._line = tee.place(_RING_SHAPES[clearance], pose).exterior

    def way_length(self, a: np.ndarray, b: np.ndarray) -> float:
        """Length in px of the shorter way along the ring between the points next to `a` and `b`."""
        way = abs(self._line.project(Point(a)) - self._line.project(Point(b)))
        return min(way, self._line.length - way)

    def ways(self, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
        """Both ways from next to `a` to next to `b`, shorter first: way-points `(N, 2)`."""
        length = self._line.length
        first = self._line.project(Point(a))
        forward = (self._line.project(Point(b)) - first) % length
        ways = []
        for way in sorted((forward, forward - length), key=abs):
            steps = np.linspace(0, way, max(int(abs(way) / _SPACING), 1) + 1)
            ways.append(shapely.get_coordinates(self._line.interpolate((first + steps) % length)))
        return ways


_RING_SHAPES = {clearance: tee.TEE.buffer(AGENT_RADIUS + clearance) for clearance in _CLEARANCES}


def plan_way(pose: Pose, agent: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Way-points `(N, 2)` from the agent (not included) to `target` (the last one), round the block."""
    if _is_free(pose, agent, target, air=0.2):
        return target[None]
    way = _way_inside_the_arena(pose, agent, target)
    way = np.concatenate([np.clip(way, 4, ARENA_SIZE - 4), target[None]])
    return _cut_corners(pose, agent, way)


def _way_inside_the_arena(pose: Pose, agent: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The shortest way, on the widest ring, that stays inside; else the shortest on the narrowest ring."""
    for clearance in _CLEARANCES:
        ways = Ring(pose, clearance).ways(agent, target)
        for way in ways:
            if (way >= 6).all() and (way <= ARENA_SIZE - 6).all():
                return way
    return ways[0]


def _cut_corners(pose: Pose, agent: np.ndarray, way: np.ndarray) -> np.ndarray:
    """Skip way-points where the straight line is free."""
    kept, here, i = [], agent, 0
    while i < len(way):
        last = len(way) - 1
        # The target itself lies close to the block, so the line to it needs less air.
        j = next(
            (j for j in range(last, i, -1) if _is_free(pose, here, way[j], air=0.5 if j == last else 3.0)), i
        )
        kept.append(way[j])
        here, i = way[j], j + 1
    return np.array(kept)


def _is_free(pose: Pose, a: np.ndarray, b: np.ndarray, air: float) -> bool:
    """Whether the agent can go straight from `a` to `b` with this many px of air to the block."""
    return LineString([a, b]).distance(tee.place(tee.TEE, pose)) >= AGENT_RADIUS + air


class PurePursuit:
    """Follows a way by aiming `LOOK_AHEAD` px ahead along it.

    The environment moves the agent with a soft PD controller; when aimed at the waypoints themselves, the
    agent cuts corners and bumps into the block.
    """

    def __init__(self, agent: np.ndarray, way: np.ndarray) -> None:
        self._line = LineString([agent, *way])
        self._done = 0.0  # px of the way behind us

    def target(self, agent: np.ndarray) -> np.ndarray:
        """The next action `(2,)` for an agent at this position."""
        # Where the way passes itself closely, the nearest point may be far ahead: go there step by step.
        self._done = max(self._done, min(self._line.project(Point(agent)), self._done + 40))
        return np.array(self._line.interpolate(self._done + LOOK_AHEAD).coords[0])

    @property
    def aims_at_end(self) -> bool:
        return self._done + LOOK_AHEAD >= self._line.length
