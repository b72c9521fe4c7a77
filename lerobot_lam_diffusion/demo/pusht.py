"""The PushT environment of gym-pusht: quiet import, its two starts, the pose of its block.

Lengths are pixels of the 512 x 512 arena, angles radians, one step is 0.1 s (10 fps).
"""

from __future__ import annotations

import math
import os
import warnings
from functools import cache
from typing import NamedTuple

import numpy as np
import pymunk

# pygame greets on standard output and warns about its own use of pkg_resources.
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    from gym_pusht.envs.pusht import PushTEnv

FPS = 10
ARENA_SIZE = 512
AGENT_RADIUS = 15.0
TASK = "Push the T-shaped block onto the T-shaped target."


class Pose(NamedTuple):
    """Position of the block's origin (middle of the bar's top edge) and its angle."""

    x: float
    y: float
    angle: float


GOAL_POSE = Pose(256.0, 256.0, math.pi / 4)


def make_env(obs_type: str = "state") -> PushTEnv:
    """The bare environment: no time limit, so that the caller decides when an episode ends.

    Args:
        obs_type: `state` (fast, nothing is rendered) or `pixels_agent_pos` (96 x 96 frame and agent).
    """
    return PushTEnv(obs_type=obs_type, render_mode="rgb_array")


def block_pose(env: PushTEnv) -> Pose:
    return Pose(env.block.position.x, env.block.position.y, env.block.angle)


def agent_position(env: PushTEnv) -> np.ndarray:
    """(2,) float64 position of the agent."""
    return np.array(env.agent.position)


def reset_options(agent: np.ndarray, pose: Pose) -> dict[str, list[float]]:
    """Options that make `env.reset` start with this agent `(2,)` and block pose.

    `reset_to_state` sets the block's position first and then turns it about its centre of gravity, which
    moves its origin; so the position handed over is the one from which that turn ends at `pose`.
    """
    cog = _center_of_gravity()
    x, y = np.array(pose[:2]) - cog + rotate(cog, pose.angle)
    return {"reset_to_state": [float(agent[0]), float(agent[1]), float(x), float(y), float(pose.angle)]}


def rotate(points: np.ndarray, angle: float) -> np.ndarray:
    """Turn points `(..., 2)` about the origin."""
    c, s = math.cos(angle), math.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


@cache
def _center_of_gravity() -> np.ndarray:
    """(2,) in the block's own frame."""
    body, _ = PushTEnv.add_tee(pymunk.Space(), (0, 0), 0)
    return np.array(body.center_of_gravity)
