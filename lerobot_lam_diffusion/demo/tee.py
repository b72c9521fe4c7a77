"""Geometry of the T-shaped block: where it is, how far from the goal, where it can be touched."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import shapely
from shapely import affinity
from shapely.geometry import LinearRing, Point, Polygon

from lerobot_lam_diffusion.demo.pusht import AGENT_RADIUS, GOAL_POSE, Pose, rotate

# The T in its own frame, origin in the middle of the bar's top edge; the same outline as gym-pusht's.
CORNERS = np.array(
    [(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], dtype=np.float64
)
TEE = Polygon(CORNERS)


def place(shape: Polygon, pose: Pose) -> Polygon:
    """The shape, drawn in the block's frame, as it lies in the arena."""
    turned = affinity.rotate(shape, pose.angle, origin=(0, 0), use_radians=True)
    return affinity.translate(turned, pose.x, pose.y)


GOAL = place(TEE, GOAL_POSE)


def coverage(pose: Pose) -> float:
    """Share of the goal that the block covers; the task is solved above 0.95."""
    return place(TEE, pose).intersection(GOAL).area / GOAL.area


def corner_positions(poses: np.ndarray) -> np.ndarray:
    """Corners `(N, 8, 2)` of the block in the arena for poses `(N, 3)`."""
    cos, sin = np.cos(poses[:, 2, None]), np.sin(poses[:, 2, None])  # (N, 1)
    x = CORNERS[:, 0] * cos - CORNERS[:, 1] * sin + poses[:, 0, None]
    y = CORNERS[:, 0] * sin + CORNERS[:, 1] * cos + poses[:, 1, None]
    return np.stack([x, y], axis=-1)


_GOAL_CORNERS = corner_positions(np.array([GOAL_POSE]))


def goal_errors(poses: np.ndarray) -> np.ndarray:
    """Mean distance `(N,)` in px between the block's corners and the goal's, for poses `(N, 3)`.

    Unlike coverage, it distinguishes right from wrong angles anywhere in the arena, and its gradient leads to
    the goal.
    """
    return np.linalg.norm(corner_positions(poses) - _GOAL_CORNERS, axis=-1).mean(axis=-1)


def goal_error(pose: Pose) -> float:
    """`goal_errors` of one pose."""
    return float(goal_errors(np.array([pose]))[0])


class Contacts(NamedTuple):
    """Places where the agent's centre can stand to push, and the direction straight at the block there."""

    positions: np.ndarray  # (N, 2)
    normals: np.ndarray  # (N, 2) unit vectors


# One px of air between agent and block, so that standing there moves nothing.
_CONTACT_LINE: LinearRing = TEE.buffer(AGENT_RADIUS + 1.0).exterior


def contacts(pose: Pose, count: int, offset: float) -> Contacts:
    """`count` contacts, evenly spaced round the block.

    Args:
        offset: in [0, 1), shifts all of them by this share of their spacing.
    """
    spots = shapely.line_interpolate_point(
        _CONTACT_LINE, (np.arange(count) + offset) / count, normalized=True
    )
    positions = shapely.get_coordinates(spots)
    touched = shapely.get_coordinates(
        shapely.line_interpolate_point(TEE.exterior, TEE.exterior.project(spots))
    )
    normals = touched - positions
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return Contacts(rotate(positions, pose.angle) + pose[:2], rotate(normals, pose.angle))


def distance(pose: Pose, point: np.ndarray) -> float:
    """Distance in px of a point `(2,)` from the block."""
    return place(TEE, pose).distance(Point(point))
