"""A robot that runs at another rate than the dataset's, or stalls, is told once."""

import sys
import types

import pytest

from lerobot_lam_diffusion.policy.tick_clock import TICKS, TickClock
from tests.policies import lam_config


def ticks(clock, *intervals):
    now = 100.0
    clock.tick(now)
    for interval in intervals:
        now += interval
        clock.tick(now)


def clock_of(**fields):
    return TickClock(lam_config(lam_tokens_path="store", lam_fps=10.0, **fields))


@pytest.mark.parametrize(
    ("rate", "is_told"), [(30, True), (15, True), (11, False), (10, False), (9, False), (5, True)]
)
def test_another_rate_than_the_datasets_is_told_once(rate, is_told, caplog):
    clock = clock_of()
    for _ in range(2):
        ticks(clock, *[1 / rate] * TICKS)
        clock.reset()
    assert caplog.text.count("--fps=10") == is_told
    if is_told:
        assert f"runs at {rate} frames a second, the policy was trained on 10" in caplog.text
        assert f"{1 / rate:.3g} s apart instead of 0.1 s" in caplog.text


def test_a_single_stall_is_no_other_rate(caplog):
    ticks(clock_of(), *[0.1] * 8, 1.2, *[0.1] * 7, 1.2, *[0.1] * 8)
    assert not caplog.text


def test_a_rate_is_unknown_without_the_datasets(caplog):
    clock = TickClock(lam_config(lam_tokens_path="store"))
    ticks(clock, *[0.01] * 50)
    clock.predict()
    assert not caplog.text


@pytest.mark.parametrize(("stride", "is_told"), [(1, False), (4, True)])
def test_pairs_that_straddle_the_stall_of_a_prediction_are_told_once(stride, is_told, caplog):
    """Each fourth tick predicts a chunk, for half a second: a stride of 4 always looks back over it."""
    clock = clock_of(lam_frame_stride=stride, n_action_steps=4)
    now = 0.0
    for tick in range(60):
        clock.tick(now)
        now += 0.1
        if tick % 4 == 0:
            clock.predict()
            now += 0.5
    assert caplog.text.count("further apart than in training") == is_told
    assert "--fps" not in caplog.text


def test_only_a_robots_ticks_are_measured(monkeypatch):
    clock = clock_of()
    monkeypatch.delitem(sys.modules, "lerobot.rollout", raising=False)
    clock.tick()
    assert not clock._times
    monkeypatch.setitem(sys.modules, "lerobot.rollout", types.ModuleType("lerobot.rollout"))
    clock.tick()
    assert len(clock._times) == 1
