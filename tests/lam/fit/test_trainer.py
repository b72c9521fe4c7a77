import math
from dataclasses import replace

import pytest
import torch

from lerobot_lam_diffusion.lam import load_lam, save_lam
from lerobot_lam_diffusion.lam.fit.data import FitData
from lerobot_lam_diffusion.lam.fit.recipe import PRESETS, FitRecipe
from lerobot_lam_diffusion.lam.fit.report import evaluate
from lerobot_lam_diffusion.lam.fit.trainer import Fit
from lerobot_lam_diffusion.utils.errors import LamError

RECIPE = FitRecipe(steps=20, batch_size=8, warmup_steps=4)


def run(data, folder, recipe=RECIPE, resume=False):
    folder.mkdir(exist_ok=True)
    fit = Fit(PRESETS["tiny"], recipe, data)
    if resume:
        fit.resume(folder)
    fit.run(folder, save_every=7, log=lambda _line: None)
    return fit


class StopError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [7, 14])  # before and after the codebook starts at step 8
@pytest.mark.parametrize("has_states", [True, False], ids=["state", "flow"])
def test_resume_equals_uninterrupted(squares, has_states, tmp_path, stop_at):
    squares = squares if has_states else replace(squares, states=None)
    whole = run(squares, tmp_path / "whole")

    def stop(_line):
        if broken.step == stop_at:
            raise StopError

    (tmp_path / "broken").mkdir()
    broken = Fit(PRESETS["tiny"], RECIPE, squares)
    with pytest.raises(StopError):
        broken.run(tmp_path / "broken", save_every=7, log=stop)
    resumed = run(squares, tmp_path / "broken", resume=True)
    assert resumed.step == whole.step == 20
    assert not torch.equal(whole.model.vq.embedding.weight, broken.model.vq.embedding.weight)
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_seeds_differ_and_repeat(squares, tmp_path):
    def weights(seed):
        fit = Fit(PRESETS["tiny"], FitRecipe(steps=3, batch_size=8, seed=seed), squares)
        fit.take_step()
        return fit.model.decoder.pred_head.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_resume_refuses_other_settings(squares, tmp_path):
    run(squares, tmp_path / "fit")
    with pytest.raises(LamError, match="other settings"):
        run(squares, tmp_path / "fit", FitRecipe(steps=21, batch_size=8), resume=True)
    with pytest.raises(LamError, match="does not exist"):
        run(squares, tmp_path / "empty", resume=True)


def test_starts_as_a_copy_of_the_frame(squares):
    """The FDM's first guess is the frame itself: nothing is spent on learning to copy."""
    fit = Fit(PRESETS["tiny"], RECIPE, squares)
    terms, _, _ = fit.model.losses(
        squares.frames[:16], squares.frames[:16], squares.states[:16], squares.states[:16] * 0, "draw",
        torch.Generator(),
    )  # fmt: skip
    spread = (squares.frames[:16].float() / 255 / 0.225).var()
    assert terms["pixels"] < 0.5 * spread


@pytest.mark.slow
@pytest.mark.parametrize("has_states", [True, False], ids=["state", "pixels alone"])
def test_learns_the_motion(squares, has_states, tmp_path):
    """Some hundred steps suffice on a toy."""
    recipe = FitRecipe(steps=300, batch_size=32, warmup_steps=20, learning_rate=3e-3)
    fit = run(squares if has_states else replace(squares, states=None), tmp_path / "fit", recipe)
    model = fit.model
    save_lam(tmp_path / "lam", PRESETS["tiny"], model.encoder, model.vq, model.decoder)
    report = evaluate(load_lam(tmp_path / "lam", fdm=True), squares)
    assert (report.episodes, report.pairs) == (2, 38)
    assert min(report.codes_used) > 2
    assert report.probe is not None
    assert report.probe.token > 0.3 > report.probe.shuffled


def test_without_states(squares, tmp_path):
    data = replace(squares, states=None)
    model = run(data, tmp_path / "fit").model
    save_lam(tmp_path / "lam", PRESETS["tiny"], model.encoder, model.vq, model.decoder)
    lam = load_lam(tmp_path / "lam", fdm=True)
    probe = evaluate(lam, data).probe
    assert probe is not None
    assert probe.target == "the optical flow"
    still = replace(data, frames=torch.full_like(data.frames, 9))
    assert evaluate(lam, still).probe is None


def test_tokens_are_tied_to_what_the_data_show(squares):
    """To the state's change; to the optical flow where no state changes, or none is wanted."""

    def terms(data, **recipe):
        return Fit(PRESETS["tiny"], replace(RECIPE, **recipe), data).take_step().keys() - {"penalty"}

    assert terms(squares) == {"state"}
    for data in (replace(squares, states=None), replace(squares, states=squares.states * 0 + 5)):
        assert terms(data) == {"flow"}
    assert terms(squares, state_weight=0.0) == {"flow"}
    assert terms(squares, state_weight=0.0, flow_weight=0.0) == {"pixels"}


def test_without_motion_and_state_nothing_can_be_fitted(squares):
    still = replace(squares, states=None, frames=torch.full_like(squares.frames, 9))
    with pytest.raises(LamError, match="Nothing moves in 4096 frame pairs, 1 frames apart"):
        Fit(PRESETS["tiny"], RECIPE, still)


def test_one_pair_is_enough_to_stay_finite(squares):
    few = torch.cat([torch.arange(2), torch.arange(20, 40)])  # frames of the first two episodes
    data = FitData(squares.frames[few], squares.episodes[few], squares.states[few], 1, 1)
    assert len(data.fit_pairs()) == 1
    assert all(math.isfinite(term) for term in Fit(PRESETS["tiny"], RECIPE, data).take_step().values())


def test_a_recipe_leaves_steps_for_the_codebook():
    with pytest.raises(LamError, match="expected less than 1"):
        FitRecipe(ground_share=0.7, draw_share=0.4)
