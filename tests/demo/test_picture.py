"""The picture: the file, what it chooses to show, and its colours; from small arrays."""

import numpy as np
import pytest

pytest.importorskip("gym_pusht")
pytest.importorskip("matplotlib")

from lerobot_lam_diffusion.demo.episode_look import EpisodeLook
from lerobot_lam_diffusion.demo.picture import choose_moments, draw_picture, motion_colors


def make_look(num_frames: int = 30, slots: int = 2, codes: int = 8, resolution: int = 16) -> EpisodeLook:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (num_frames, resolution, resolution, 3), dtype=np.uint8)
    token_codes = rng.integers(0, codes, (num_frames, slots))
    token_codes[0] = -1
    motion = rng.normal(size=(num_frames, 2)) * 10
    motion[0] = 0
    return EpisodeLook(
        episode=3,
        fps=10,
        frames=frames,
        predicted=frames[1:],
        codes=token_codes,
        motion=motion,
        code_motion=rng.normal(size=(slots, codes, 2)) * 10,
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_frames", [2, 5, 200])
def test_the_picture_is_a_png_of_reasonable_size(tmp_path, num_frames):
    path = draw_picture(make_look(num_frames), [1.0, 0.5, 0.4], tmp_path / "picture.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert 30_000 < len(content) < 2_000_000


@pytest.mark.slow
def test_other_tokens_give_another_picture(tmp_path):
    look = make_look()
    first = draw_picture(look, [1.0, 0.5], tmp_path / "a.png").read_bytes()
    look.codes[1:] = (look.codes[1:] + 1) % 8
    assert draw_picture(look, [1.0, 0.5], tmp_path / "b.png").read_bytes() != first


def test_one_step_of_training_is_enough(tmp_path):
    assert draw_picture(make_look(), [1.0], tmp_path / "picture.png").exists()


def test_moments_are_fast_in_order_and_apart():
    look = make_look(60)
    moments = choose_moments(look)
    assert len(moments) == 6
    assert moments == sorted(moments)
    assert min(moments) >= 1
    assert np.diff(moments).min() > 60 // 9
    assert int(np.argmax(np.linalg.norm(look.motion, axis=1))) in moments


def test_a_short_episode_has_fewer_moments():
    assert choose_moments(make_look(2)) == [1]


def test_errors_are_zero_for_a_perfect_prediction_and_shares_of_full_brightness():
    look = make_look()
    assert look.fdm_error.shape == look.copy_error.shape == (29, 16, 16)
    assert look.fdm_error.max() == 0
    assert 0.2 < look.copy_error.mean() < 0.5
    predicted, copied = look.moving_errors
    assert predicted == 0
    assert copied > 0.1


def test_standing_still_is_white_and_opposite_ways_differ():
    still, right, left = motion_colors(np.array([[0.0, 0.0], [5.0, 0.0], [-5.0, 0.0]]), fast=5)
    np.testing.assert_array_equal(still, 1)
    assert np.abs(right - left).max() > 0.5
    half, full, beyond = motion_colors(np.array([[2.5, 0.0], [5.0, 0.0], [9.0, 0.0]]), fast=5)
    np.testing.assert_array_equal(full, beyond)
    assert half.sum() > full.sum()
