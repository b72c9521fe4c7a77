"""The PushT expert: its geometry, its simulation, its walks, and that it solves the task."""

import math
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from lerobot_lam_diffusion.demo import tee, walk
from lerobot_lam_diffusion.demo.expert import (
    NEAR_GOAL_ANGLE,
    NEAR_GOAL_DISTANCE,
    Demonstration,
    near_goal_start,
    plan_episode,
)
from lerobot_lam_diffusion.demo.pushes import PushPlanner, PushSimulation
from lerobot_lam_diffusion.demo.pusht import (
    AGENT_RADIUS,
    GOAL_POSE,
    Pose,
    agent_position,
    block_pose,
    make_env,
    reset_options,
)

POSE = Pose(200.0, 300.0, 1.0)


# --- geometry


def test_at_the_goal_the_error_is_zero_and_the_coverage_one():
    assert tee.coverage(GOAL_POSE) == pytest.approx(1.0)
    assert tee.goal_error(GOAL_POSE) == pytest.approx(0.0)


def test_a_shifted_block_has_the_shift_as_error():
    assert tee.goal_error(Pose(GOAL_POSE.x + 3, GOAL_POSE.y - 4, GOAL_POSE.angle)) == pytest.approx(5.0)


def test_a_block_upside_down_at_the_goal_has_an_error():
    assert tee.goal_error(Pose(GOAL_POSE.x, GOAL_POSE.y, GOAL_POSE.angle + math.pi)) > 50


def test_corners_and_coverage_are_the_environments():
    env = make_env()
    env.reset(seed=3, options=reset_options(np.array([60.0, 60.0]), Pose(270.0, 240.0, 0.6)))
    theirs = env.get_keypoints(env.block.shapes)  # (8, 2), in another order and with inner corners
    ours = tee.corner_positions(np.array([block_pose(env)]))[0]
    for corner in ours:
        assert np.linalg.norm(theirs - corner, axis=1).min() < 1e-9
    assert tee.coverage(block_pose(env)) == pytest.approx(env._get_coverage())


def test_contacts_touch_nothing_and_face_the_block():
    spots = tee.contacts(POSE, count=50, offset=0.3)
    assert spots.positions.shape == spots.normals.shape == (50, 2)
    for position, normal in zip(*spots, strict=True):
        assert tee.distance(POSE, position) == pytest.approx(AGENT_RADIUS + 1, abs=0.1)
        assert tee.distance(POSE, position + normal) == pytest.approx(AGENT_RADIUS, abs=0.1)


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


# --- simulation and search


def test_a_push_moves_the_block_along_and_a_miss_does_not():
    simulation = PushSimulation()
    upright = Pose(250.0, 200.0, 0.0)
    above = np.array([250.0, 200.0 - AGENT_RADIUS - 1])
    pushed = simulation.roll_out(upright, above, np.array([0.0, 1.0]), 20)
    assert pushed.shape == (20, 3)
    assert pushed[-1, 1] > upright.y + 10
    missed = simulation.roll_out(upright, above, np.array([0.0, -1.0]), 20)
    np.testing.assert_allclose(missed, np.broadcast_to(upright, (20, 3)), atol=1e-6)


def test_a_push_does_not_depend_on_the_pushes_before_it():
    used = PushSimulation()
    spots = tee.contacts(POSE, count=12, offset=0.5)
    for position, normal in zip(*spots, strict=True):
        fresh = PushSimulation().roll_out(POSE, position, normal, 40)
        np.testing.assert_array_equal(used.roll_out(POSE, position, normal, 40), fresh)


def test_the_planned_push_helps_and_ends_as_predicted():
    push = PushPlanner(np.random.default_rng(0)).best_push(POSE, np.array([100.0, 100.0]))
    assert push is not None
    assert push.error < tee.goal_error(POSE)
    end = PushSimulation().roll_out(POSE, push.start, push.direction, push.distance)[-1:]
    assert tee.goal_errors(end)[0] == pytest.approx(push.error)


# --- walking


def test_the_way_goes_round_the_block():
    pose = Pose(256.0, 200.0, 0.0)
    agent, target = np.array([200.0, 300.0]), np.array([320.0, 300.0])  # the stem lies between them
    way = walk.plan_way(pose, agent, target)
    assert len(way) > 1
    np.testing.assert_array_equal(way[-1], target)
    points = np.concatenate([agent[None], way])
    for a, b in pairwise(points):
        for share in np.linspace(0, 1, 20):
            assert tee.distance(pose, a + share * (b - a)) >= AGENT_RADIUS


def test_a_free_way_is_straight():
    agent, target = np.array([50.0, 50.0]), np.array([400.0, 60.0])
    np.testing.assert_array_equal(walk.plan_way(Pose(256.0, 300.0, 0.0), agent, target), target[None])


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
