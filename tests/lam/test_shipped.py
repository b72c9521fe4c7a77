"""The shipped LAM means something: measured again on PushT episodes that it was not fitted to.

`data/pusht_heldout.*` are the last ten episodes of the PushT demonstrations behind `pusht-compact`, which its
fit held out: the video as encoded, and the states.
"""

import av
import numpy as np
import pytest
import torch

from lerobot_lam_diffusion.lam import load_lam, resolve_lam
from lerobot_lam_diffusion.lam.fit.data import FitData
from lerobot_lam_diffusion.lam.fit.report import evaluate

from .conftest import DATA

pytestmark = pytest.mark.slow

FITTED_EPISODES = 5
"""The probe's regression is fitted to five of the ten episodes and measured on the other five."""


@pytest.fixture(scope="module")
def report():
    with av.open(str(DATA / "pusht_heldout.mp4")) as video:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    columns = np.load(DATA / "pusht_heldout.npz")
    data = FitData(
        torch.from_numpy(frames).movedim(-1, 1).contiguous(),
        torch.from_numpy(columns["episode"]).long(),
        torch.from_numpy(columns["state"]),
        holdout_episodes=10 - FITTED_EPISODES,
    )
    return evaluate(load_lam("pusht-compact", fdm=True), data)


def test_tokens_tell_where_the_pusher_went(report):
    assert report.episodes == 5
    assert report.probe.token > 0.8
    assert report.probe.shuffled < 0.05


def test_every_slot_uses_the_codebook(report):
    assert min(report.perplexity) > 16


def test_predicted_frames_move_what_moves(report):
    assert report.moving_error < 0.7 * report.moving_copy_error
    assert report.moving_deviation < 0.8 * report.moving_copy_deviation


def test_predicted_frames_keep_what_stays(report):
    assert report.error < 0.8 * report.copy_error
    assert report.deviation < 1.1 * report.copy_deviation


def test_is_small():
    assert sum(path.stat().st_size for path in resolve_lam("pusht-compact").iterdir()) <= 4e6
