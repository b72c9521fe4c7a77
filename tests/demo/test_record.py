"""The recorder: what it writes is what the environment showed, and it leaves no half datasets."""

import gc
import os

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from datasets import are_progress_bars_disabled
from lerobot.datasets import LeRobotDataset

from lerobot_lam_diffusion.demo import record
from lerobot_lam_diffusion.demo.expert import Demonstration, plan_episode
from lerobot_lam_diffusion.demo.pusht import TASK, make_env
from lerobot_lam_diffusion.demo.quiet import quiet_recording
from lerobot_lam_diffusion.demo.record import record_pusht

NUM_EPISODES = 2


def fail_on_seed_0(seed: int, *, near_goal: bool) -> Demonstration | None:
    return plan_episode(seed, near_goal=near_goal) if seed > 0 else None


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """Summary of two short episodes; the planner's first seed is made to fail."""
    folder = tmp_path_factory.mktemp("recording")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "plan_episode", fail_on_seed_0)
        return record_pusht(folder / "new" / "pusht", "local/pusht", NUM_EPISODES, near_goal=True)


@pytest.fixture(scope="session")
def dataset(recording):
    return LeRobotDataset("local/pusht", root=recording.root, video_backend="pyav")


@pytest.mark.slow
def test_summary_counts_episodes_and_failed_seeds(recording):
    assert recording.failed_seeds == [0]
    assert recording.seeds == [1, 2]


def test_the_dataset_reopens_with_the_features_of_pusht(recording, dataset):
    assert dataset.meta.total_episodes == NUM_EPISODES
    assert len(dataset) == recording.num_frames
    assert dataset.fps == 10
    assert dataset.meta.video_keys == ["observation.image"]
    assert tuple(dataset.meta.features["observation.image"]["shape"]) == (96, 96, 3)
    assert tuple(dataset.meta.features["observation.state"]["shape"]) == (2,)
    assert tuple(dataset.meta.features["action"]["shape"]) == (2,)
    assert dataset[0]["task"] == TASK


def observations(demonstration: Demonstration) -> tuple[np.ndarray, np.ndarray]:
    """What the environment itself shows before each action: frames (T, 96, 96, 3) and agents (T, 2)."""
    env = make_env(obs_type="pixels_agent_pos")
    shown = [env.reset(seed=demonstration.seed, options=demonstration.options)[0]]
    shown += [env.step(action)[0] for action in demonstration.actions]
    return np.array([o["pixels"] for o in shown[:-1]]), np.array([o["agent_pos"] for o in shown[:-1]])


def test_each_frame_is_the_observation_before_its_action(recording, dataset):
    demonstrations = [plan_episode(seed, near_goal=True) for seed in recording.seeds]
    states = np.concatenate([observations(d)[1] for d in demonstrations]).astype(np.float32)
    stored = dataset.hf_dataset.with_format("numpy")
    np.testing.assert_array_equal(stored["observation.state"], states)
    np.testing.assert_array_equal(stored["action"], np.concatenate([d.actions for d in demonstrations]))
    assert [e["length"] for e in dataset.meta.episodes] == [len(d.actions) for d in demonstrations]


def test_the_video_shows_what_the_environment_rendered(recording, dataset):
    frames, states = observations(plan_episode(recording.seeds[1], near_goal=True))
    start = dataset.meta.episodes[1]["dataset_from_index"]
    motion = np.linalg.norm(np.diff(states, axis=0), axis=1)  # (T - 1,) px
    # Where the agent moves fast on both sides, a frame is like no other even after lossy encoding.
    for i in 1 + np.argsort(np.minimum(motion[:-1], motion[1:]))[-3:]:
        image = (
            dataset[int(start + i)]["observation.image"].numpy().transpose(1, 2, 0)
        )  # (96, 96, 3) in [0, 1]
        errors = np.abs(image - frames / 255).mean(axis=(1, 2, 3))  # (T,)
        assert errors[i] < 0.02
        assert np.argmin(errors) == i


def test_nothing_but_the_dataset_is_left_beside_it(recording):
    root = recording.root
    assert [path.name for path in root.parent.iterdir()] == [root.name]


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted_at_seed_5(seed: int, *, near_goal: bool) -> Demonstration | None:
        if seed == 5:
            raise KeyboardInterrupt
        return plan_episode(seed, near_goal=near_goal)

    monkeypatch.setattr(record, "plan_episode", interrupted_at_seed_5)
    with pytest.raises(KeyboardInterrupt):
        record_pusht(tmp_path / "pusht", "local/x", 2, near_goal=True, first_seed=4)
    gc.collect()  # LeRobot's writers finish their work when they are collected
    assert list(tmp_path.iterdir()) == []


def test_an_expert_that_always_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "plan_episode", lambda seed, near_goal: None)
    with pytest.raises(RuntimeError, match="Check the versions of gym-pusht and pymunk"):
        record_pusht(tmp_path / "pusht", "local/x", 1, near_goal=True)
    assert list(tmp_path.iterdir()) == []


def test_while_recording_c_libraries_are_silent_and_afterwards_heard_again(capfd):
    bars_were_disabled = are_progress_bars_disabled()
    with quiet_recording() as terminal:
        os.write(2, b"what an encoder says\n")
        terminal.write("a progress bar\n")
        assert are_progress_bars_disabled()
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "a progress bar\nlater\n"
    assert are_progress_bars_disabled() == bars_were_disabled
