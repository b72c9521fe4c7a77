"""Refining the FDM: tokens stay, predictions get better, a resumed run goes the same way."""

import pytest
import torch

from lerobot_lam_diffusion.lam import load_lam, save_lam
from lerobot_lam_diffusion.lam.fit.data import FitData
from lerobot_lam_diffusion.lam.fit.recipe import PRESETS, FitRecipe
from lerobot_lam_diffusion.lam.fit.refine import DecoderRefinement, copying_decoder
from lerobot_lam_diffusion.lam.fit.trainer import Fit
from lerobot_lam_diffusion.utils.errors import LamError

RECIPE = FitRecipe(steps=100, batch_size=8, warmup_steps=2, learning_rate=3e-3)


@pytest.fixture
def data():
    """A bright square that wanders over grey, 3 episodes of 20 frames."""
    frames = torch.full((60, 3, 32, 32), 120, dtype=torch.uint8)
    for frame in range(60):
        at = 2 + frame % 20
        frames[frame, :, at : at + 6, 10:16] = 250
    return FitData(frames, torch.arange(60) // 20, None, holdout_episodes=1)


@pytest.fixture
def folder(data, tmp_path):
    model = Fit(PRESETS["tiny"], FitRecipe(steps=1, batch_size=4), data).model
    return save_lam(tmp_path / "lam", PRESETS["tiny"], model.encoder, model.vq, model.decoder)


def refined(folder, data):
    return DecoderRefinement(load_lam(folder, fdm=True), RECIPE, data)


def test_tokens_stay_and_predictions_get_better(folder, data, tmp_path):
    before, work = load_lam(folder, fdm=True), refined(folder, data)
    terms = [work.take_step() for _ in range(RECIPE.steps)]
    assert sum(terms[-1].values()) < 0.8 * sum(terms[0].values())
    assert all(terms[-1][name] < terms[0][name] for name in ("all", "moving"))
    lam = work.lam
    after = load_lam(save_lam(tmp_path / "new", lam.config, lam.encoder, lam.vq, work.decoder), fdm=True)
    assert after.fingerprint == before.fingerprint
    pairs = data.pair_frames(data.holdout_pairs())
    for ours, theirs in zip(after.encode_pairs(*pairs), before.encode_pairs(*pairs), strict=True):
        assert torch.equal(ours, theirs)


def test_a_wider_decoder_begins_as_a_copy_and_keeps_the_tokens(folder, data, tmp_path):
    lam = load_lam(folder, fdm=True)
    wider = copying_decoder(lam, data, width=128, depth=1, seed=0)
    prev, cur = data.pair_frames(data.holdout_pairs())
    tokens = wider.encode_pairs(prev, cur)
    assert torch.equal(tokens.quantized, lam.encode_pairs(prev, cur).quantized)
    copied = wider.predict_next(prev, tokens.quantized)
    assert (copied.int() - prev.int()).abs().max() <= 2  # levels of 255
    saved = save_lam(tmp_path / "wider", wider.config, wider.encoder, wider.vq, wider.decoder)
    assert load_lam(saved).fingerprint == lam.fingerprint


def test_resumed_refinement_ends_with_the_same_weights(folder, data, tmp_path):
    straight, halved, resumed = refined(folder, data), refined(folder, data), refined(folder, data)
    for _ in range(4):
        straight.take_step()
    halved.take_step(), halved.take_step()
    halved.save(tmp_path)
    resumed.resume(tmp_path)
    resumed.take_step(), resumed.take_step()
    for name, tensor in straight.decoder.state_dict().items():
        assert torch.equal(tensor, resumed.decoder.state_dict()[name]), name
        assert torch.equal(straight.average.state_dict()[name], resumed.average.state_dict()[name]), name


def test_frames_without_motion_are_refused(folder, data):
    still = FitData(torch.zeros_like(data.frames), data.episodes, None, holdout_episodes=1)
    with pytest.raises(LamError, match="Nothing moves"):
        refined(folder, still)
