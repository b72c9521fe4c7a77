from dataclasses import replace

import pytest
import torch

from lerobot_lam_diffusion.lam.fit.data import moving_pixels
from lerobot_lam_diffusion.utils.errors import LamError


def test_pairs_stay_inside_an_episode_and_a_side(squares):
    data = replace(squares, frame_stride=3)
    assert len(data.fit_pairs()) == 4 * 17
    assert len(data.holdout_pairs()) == 2 * 17
    assert torch.equal(data.episodes[data.fit_pairs()], data.episodes[data.fit_pairs() - 3])
    assert data.episodes[data.fit_pairs()].max() == 3
    assert data.episodes[data.holdout_pairs()].min() == 4


def test_state_changes_span_the_stride(squares):
    data = replace(squares, frame_stride=2)
    later = data.fit_pairs()[:1]
    assert torch.equal(data.state_changes(later)[0], data.states[2] - data.states[0])


@pytest.mark.parametrize("holdout", [0, 6])
def test_both_sides_need_an_episode(squares, holdout):
    with pytest.raises(LamError, match=f"{holdout} of 6 episodes would be held out"):
        replace(squares, holdout_episodes=holdout)


def test_episodes_shorter_than_the_stride(squares):
    with pytest.raises(LamError, match="no pair of frames 20 apart"):
        replace(squares, frame_stride=20)


def test_moving_pixels_ignore_flicker():
    prev = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    cur = prev.clone()
    cur[0, 1, 0, 0] = 120
    cur[0, 2, 1, 1] = 79
    assert moving_pixels(prev, cur).tolist() == [[[False, False], [False, True]]]
