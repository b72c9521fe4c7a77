"""The study behind docs/EVIDENCE.md: its intervals, its controls, and that its trainer trains."""

import dataclasses

import numpy as np
import pytest
import torch

from lerobot_lam_diffusion.demo.record import record_pusht
from lerobot_lam_diffusion.lam.fit.flow import mean_flow
from tests.benchmarks.study import closed_loop, conveyor, lams, pendulum
from tests.benchmarks.study.data import ACTION, ENV, STATE, Recorded
from tests.benchmarks.study.offline import STUDIES
from tests.benchmarks.study.policies import Budget, run
from tests.benchmarks.study.report import closed_loop_table, conveyor_table
from tests.benchmarks.study.results import Results
from tests.benchmarks.study.statistics import ratio, wilson

TINY = Budget(steps=2, batch_size=4, down_dims=(8, 16), noise_samples=2, every=2)


@pytest.fixture
def data() -> Recorded:
    """Five episodes of nine frames, the last two held out."""
    torch.manual_seed(0)
    frames = 45
    columns = {STATE: torch.randn(frames, 2), ENV: torch.randn(frames, 16), ACTION: torch.randn(frames, 2)}
    pictures = torch.randint(0, 255, (frames, 3, 32, 32), dtype=torch.uint8)
    return Recorded(columns, pictures, torch.arange(frames) // 9, held_out=2)


def test_wilson_interval_of_known_values():
    # R: prop.test(0, 10, correct=FALSE), prop.test(8, 10, correct=FALSE)
    assert wilson(0, 10) == pytest.approx((0.0, 0.0, 0.2775328), abs=1e-6)
    assert wilson(8, 10) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)


def test_bootstrap_is_paired_and_covers_like_the_normal_interval():
    rng = np.random.default_rng(0)
    baseline = rng.uniform(1, 10, (3, 40))
    assert ratio(0.5 * baseline, baseline) == pytest.approx((0.5, 0.5, 0.5))  # paired: nothing varies
    ours = np.ones((1, 400)) + 0.1 * rng.standard_normal((1, 400))
    found = ratio(ours, np.ones((1, 400)))
    half = 1.96 * ours.std() / 20
    assert found == pytest.approx((ours.mean(), ours.mean() - half, ours.mean() + half), abs=0.1 * half)


def test_finished_runs_are_found_again(tmp_path):
    results = Results(tmp_path / "x.jsonl")
    results.add(condition="a", seed=1, error=[1.0, 2.0])
    again = Results(tmp_path / "x.jsonl")
    assert again.has("a", 1)
    assert not again.has("a", 0)
    assert again.values("a", "error", [1]).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_names_of_conditions_are_unique_and_have_a_baseline(study):
    names = [condition.name for condition in study()]
    assert len(set(names)) == len(names)
    assert {condition.against for condition in study()} <= set(names)


def test_shuffled_tokens_are_of_other_episodes_of_the_same_side(data):
    marked = data.episode[:, None].float() + 1  # a token tells its episode
    shuffled = lams.of_other_episodes(lams.Tokens(lams.store_of(marked, data, 1), 1.0, 1), data)
    taken = shuffled.store.values[:, 0].long() - 1
    assert (taken != data.episode).all()
    assert ((taken >= data.train_episodes) == (data.episode >= data.train_episodes)).all()


def test_state_changes_are_zero_where_there_is_no_frame_before(data):
    tokens = lams.state_changes(data, stride=2)
    window = tokens.store.window(torch.tensor([9, 10, 11]), [0])[:, 0]
    assert not window[:2].any()
    torch.testing.assert_close(window[2], data.columns[STATE][11] - data.columns[STATE][9])


def test_flows_are_zero_where_there_is_no_frame_before(data):
    window = lams.flows(data, stride=2).store.window(torch.tensor([9, 10, 11]), [0])[:, 0]
    assert not window[:2].any()
    torch.testing.assert_close(window[2:], mean_flow(data.frames[9:10], data.frames[11:12]))


@pytest.mark.slow
def test_lams_see_no_held_out_frame_and_controls_are_not_degenerate(data, tmp_path):
    how = {"batch_size": 2, "preset": "tiny"}
    choice = lams.LamChoice(2)
    fitted = lams.encoded(choice, data, tmp_path / "a", **how)
    data.frames[data.held_out_frames] = 0
    blind = lams.encoded(choice, data, tmp_path / "b", **how)
    train = data.train_frames
    assert torch.equal(fitted["continuous"][train], blind["continuous"][train])
    random = lams.encoded(lams.LamChoice(0, is_random=True), data, tmp_path / "a", **how)
    assert len(random["vq"][train].unique(dim=0)) > 3


@pytest.mark.slow
def test_policies_train_and_tokens_of_zeros_are_the_stock_policy(data):
    def measured(tokens, offsets=(0,), n_obs_steps=2):
        return run(data, tokens, offsets, n_obs_steps, data.train_frames, TINY, seed=0)

    zeros = lams.Tokens(lams.store_of(torch.zeros(45, 8), data, 1), 1.0, 2)
    stock = measured(None)
    assert len(stock["error"]) == 2
    assert measured(zeros)["error"] == stock["error"]
    changes = lams.state_changes(data)
    assert measured(changes)["error"] != stock["error"]
    for offsets, n_obs_steps in (((-1, 0), 2), (tuple(range(1, 9)), 1)):
        assert np.isfinite(measured(changes, offsets, n_obs_steps)["error"]).all()
    assert np.isfinite(measured(None, n_obs_steps=4)["error"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("number", conveyor.STUDIES)
def test_conveyor_records_fits_and_measures_every_arm(number, tmp_path, monkeypatch):
    arms = {
        name: (n, which, lam and dataclasses.replace(lam, steps=2))
        for name, (n, which, lam) in conveyor.STUDIES[number].conditions.items()
    }
    study = dataclasses.replace(conveyor.STUDIES[number], train=6, budget=TINY, conditions=arms)
    monkeypatch.setitem(conveyor.STUDIES, number, study)
    for name, value in {"HELD_OUT": 3, "SEEDS": (0,), "LAM_BATCH": 4}.items():
        monkeypatch.setattr(conveyor, name, value)
    command = [f"--work_dir={tmp_path}", f"--study={number}"]
    conveyor.main(command)
    conveyor.main(command)  # nothing is left to do
    rows = conveyor.results_of(number, tmp_path).rows
    assert [row["condition"] for row in rows] == list(arms)
    assert all(row["n"] == 3 * 11 and len(row["error"]) == 3 for row in rows)
    assert conveyor_table(conveyor.results_of(number, tmp_path), number).count("\n") == len(arms) + 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [6, 8, 11, 14], ids=["keypoints", "pictures", "pendulum", "flow"])
def test_closed_loop_acts_in_the_arena_with_live_tokens(number, tmp_path, monkeypatch):
    """Whatever the policy sees, the token is computed from rendered frames."""
    small = {"HELD_OUT": 2, "STARTS": 2, "LAM_BATCH": 4}
    for name, value in small.items():
        monkeypatch.setattr(closed_loop, name, value)
    monkeypatch.setattr(pendulum, "EPISODES", 4)
    root, study = tmp_path / "demonstrations", closed_loop.STUDIES[number]
    if isinstance(study.task, closed_loop.PushT):
        record_pusht(root, "local/near", 4, near_goal=True, first_seed=20_000)
    task, lam = dataclasses.replace(study.task, longest=6), dataclasses.replace(study.lam, steps=2)
    study = dataclasses.replace(study, task=task, lam=lam, budget=TINY)
    monkeypatch.setitem(closed_loop.STUDIES, number, study)
    command = [f"--dataset.root={root}", f"--work_dir={tmp_path}", "--seeds", "0", f"--study={number}"]
    closed_loop.main(command)
    closed_loop.main(command)  # nothing is left to do
    results = closed_loop.results_of(number, tmp_path)
    assert [row["condition"] for row in results.rows] == [f"{name}, 2 steps" for name in study.conditions]
    assert all(len(row["success"]) == len(row["coverage"]) == 2 for row in results.rows)
    assert all(len(row["error"]) == 2 for row in results.rows)
    table = closed_loop_table(results, number)
    assert table.count("\n") == len(study.conditions) + 1
    solved = sum(results.rows[0]["success"]) / 2
    assert f"| {next(iter(study.conditions))}, 2 steps | 1 | {solved:.2f} [" in table


@pytest.mark.slow
def test_the_pendulum_is_held_only_by_who_knows_its_velocity():
    def held(torque) -> float:
        arena = pendulum.Pendulums(50)
        for step in range(pendulum.LONGEST):
            if step % 2 == 0:  # as the policies decide
                actions = torch.tensor([[torque(one)] for one in arena.all])
            arena.step(actions)
        return float(arena.solved.mean())

    assert held(lambda one: one.expert()) > 0.6
    for gain in (5, 8, 15, 40):
        assert held(lambda one, gain=gain: float(np.clip(-gain * one.angle, -2, 2))) < 0.2


def test_closed_loop_refuses_a_condition_of_another_study(tmp_path, capsys):
    with pytest.raises(SystemExit):
        closed_loop.main([f"--dataset.root={tmp_path}", f"--work_dir={tmp_path}", "--conditions", "concat"])
    assert "['concat'] are not among ['stock', 'latest', 'true state change']" in capsys.readouterr().err


def test_conveyor_shows_its_action_only_by_motion():
    ride, faster = conveyor.Ride(48, 1.0, 0), conveyor.Ride(47, 3.0, 0)
    frame = 6  # half a frame after the middle: both blocks are at 48.5
    assert (ride.picture(frame) == faster.picture(frame)).all()
    assert faster.place(frame + conveyor.LEAD) - ride.place(frame + conveyor.LEAD) == 2 * conveyor.LEAD
