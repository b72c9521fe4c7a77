"""The PushT expert: its geometry is the environment's, and it solves the task."""

import math

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from lerobot_lam_diffusion.demo import tee
from lerobot_lam_diffusion.demo.expert import (
    NEAR_GOAL_ANGLE,
    NEAR_GOAL_DISTANCE,
    Demonstration,
    near_goal_start,
    plan_episode,
)
from lerobot_lam_diffusion.demo.pusht import (
    GOAL_POSE,
    Pose,
    agent_position,
    block_pose,
    make_env,
    reset_options,
)

POSE = Pose(200.0, 300.0, 1.0)


# --- geometry


def test_corners_and_coverage_are_the_environments():
    env = make_env()
    env.reset(seed=3, options=reset_options(np.array([60.0, 60.0]), Pose(270.0, 240.0, 0.6)))
    theirs = env.get_keypoints(env.block.shapes)  # (8, 2), in another order and with inner corners
    ours = tee.corner_positions(np.array([block_pose(env)]))[0]
    for corner in ours:
        assert np.linalg.norm(theirs - corner, axis=1).min() < 1e-9
    assert tee.coverage(block_pose(env)) == pytest.approx(env._get_coverage())


# --- starts


def test_reset_options_place_the_block_where_they_say():
    env = make_env()
    env.reset(seed=0, options=reset_options(np.array([80.0, 90.0]), POSE))
    np.testing.assert_allclose(block_pose(env), POSE, atol=1e-9)
    np.testing.assert_allclose(agent_position(env), [80.0, 90.0])


def test_near_goal_starts_are_near_the_goal_but_not_on_it():
    env = make_env()
    for seed in range(20):
        env.reset(seed=seed, options=near_goal_start(np.random.default_rng(seed)))
        pose = block_pose(env)
        assert math.hypot(pose.x - GOAL_POSE.x, pose.y - GOAL_POSE.y) <= NEAR_GOAL_DISTANCE + 1e-6
        assert abs(pose.angle - GOAL_POSE.angle) <= NEAR_GOAL_ANGLE + 1e-6
        assert tee.coverage(pose) < 0.95


# --- whole episodes


@pytest.fixture(scope="module")
def demonstrations() -> list[Demonstration]:
    planned = [plan_episode(seed, near_goal=True) for seed in range(4)]
    assert None not in planned
    return planned


def coverage_after(demonstration: Demonstration) -> list[float]:
    env = make_env()
    env.reset(seed=demonstration.seed, options=demonstration.options)
    return [env.step(action)[4]["coverage"] for action in demonstration.actions]


@pytest.mark.slow
def test_near_goal_starts_are_solved_with_the_last_action(demonstrations):
    for demonstration in demonstrations:
        assert demonstration.actions.dtype == np.float32
        assert demonstration.actions.shape == (len(demonstration.actions), 2)
        assert demonstration.actions.min() >= 0
        assert demonstration.actions.max() <= 512
        covered = coverage_after(demonstration)
        assert covered[-1] > 0.95
        assert max(covered[:-1]) <= 0.95
        assert covered[-1] == pytest.approx(demonstration.coverage)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_actions_and_another_seed_others(demonstrations):
    again = plan_episode(0, near_goal=True)
    np.testing.assert_array_equal(again.actions, demonstrations[0].actions)
    assert again.options == demonstrations[0].options
    assert demonstrations[0].options != demonstrations[1].options


@pytest.mark.slow
def test_a_standard_start_is_solved():
    demonstration = plan_episode(0)
    assert demonstration.options is None
    assert coverage_after(demonstration)[-1] > 0.95


def test_too_few_steps_give_no_demonstration():
    assert plan_episode(0, max_steps=5) is None
