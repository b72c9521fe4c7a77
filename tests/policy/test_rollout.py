"""What may go wrong between training and the robot: told early, or once, with what to do."""

import logging
import sys
import types

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig

from lerobot_lam_diffusion import OBS_LAM_IMAGES, DiffusionLamPolicy
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import FPS, TOP, record_dataset
from tests.policies import build, lam_config, live_config, observation, training_batch
from tests.policy.test_live import deploy


@pytest.fixture(scope="module")
def checkpoint(dataset, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    policy, preprocess = build(lam_config(lam_tokens_path=str(store.path), lam_token_dropout=0.5), dataset)
    policy.forward(preprocess(training_batch(policy.config, dataset, [1, 20])))
    policy.save_pretrained(folder)
    return folder


def loaded_as_lerobot_does(checkpoint, *overrides):
    """As `lerobot-rollout` and `lerobot-eval` load a policy, before a robot or environment is there."""
    config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=list(overrides))
    config.pretrained_path = checkpoint
    return DiffusionLamPolicy.from_pretrained(checkpoint, config=config)


def test_a_missing_lam_is_told_before_a_robot_moves(checkpoint, tmp_path, monkeypatch, caplog):
    gone = f"--lam_model_path={tmp_path / 'nowhere'}"
    monkeypatch.setitem(sys.modules, "lerobot.rollout", types.ModuleType("lerobot.rollout"))
    with pytest.raises(UserError, match=r"--policy\.lam_model_path"):
        loaded_as_lerobot_does(checkpoint, gone)
    loaded_as_lerobot_does(checkpoint, gone, "--lam_missing=zero")
    assert "Acting without LAM tokens" in caplog.text
    assert loaded_as_lerobot_does(checkpoint).diffusion.lam_model is not None
    monkeypatch.delitem(sys.modules, "lerobot.rollout")
    loaded_as_lerobot_does(checkpoint, gone)  # an environment may bring tokens of its own
    assert "The first action needs it" in caplog.text
    assert DiffusionLamPolicy.from_pretrained(checkpoint).diffusion.lam_model is None  # merely looked at


def test_frames_of_another_size_are_told_once(dataset, checkpoint, store, tmp_path, caplog):
    policy = loaded_as_lerobot_does(checkpoint)
    assert policy.config.lam_frame_size == "48x48"
    _, preprocess = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    with caplog.at_level(logging.WARNING):
        policy.select_action(preprocess(observation(dataset, [0])))
    assert "height x width" not in caplog.text
    policy = loaded_as_lerobot_does(checkpoint)
    for row in (0, 1):
        seen = preprocess(observation(dataset, [row]))
        large = torch.nn.functional.interpolate(seen[OBS_LAM_IMAGES][TOP], (64, 96))
        policy.select_action({**seen, OBS_LAM_IMAGES: {TOP: large}})
        policy.reset()
    assert caplog.text.count("are 64x96 (height x width), those of the training dataset were 48x48") == 1


def test_a_robot_without_the_camera_is_told_what_it_needs(dataset, store):
    policy, preprocess, _ = deploy(dataset, store)
    seen = preprocess(observation(dataset, [0]))
    seen[OBS_LAM_IMAGES] = {}
    with pytest.raises(UserError, match=r"is not among the cameras \[\] of .*--rename_map .*--env.obs_type"):
        policy.select_action(seen)


def test_one_observation_step_is_enough_for_the_newest_token_on_the_fly(dataset, store, lam_folder):
    config = live_config(lam_folder, n_obs_steps=1)
    assert config.lam_conditioning_steps == 1
    policy, preprocess = build(config, dataset)
    rows = [0, 5, 20]
    batch = preprocess(training_batch(config, dataset, rows))
    tokens = policy._with_window_tokens(batch)["observation.lam_tokens"]
    assert torch.equal(tokens, store.window(torch.tensor(rows), [0]))
    assert torch.isfinite(policy.forward(batch)[0])
    with pytest.raises(UserError, match="lam_temporal_aggregation=concat"):
        live_config(lam_folder, n_obs_steps=1, lam_temporal_aggregation="concat")


def test_a_chunk_is_predicted_without_tokens_where_the_user_says_so(dataset, checkpoint, store):
    policy = loaded_as_lerobot_does(checkpoint, "--lam_missing=zero", "--num_inference_steps=1")
    _, preprocess = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    batch = preprocess(training_batch(policy.config, dataset, [3, 20]))
    actions = policy.predict_action_chunk(batch)
    assert actions.shape == (2, policy.config.n_action_steps, 2)
    strict = loaded_as_lerobot_does(checkpoint, "--num_inference_steps=1")
    with pytest.raises(UserError, match="no LAM tokens under"):
        strict.predict_action_chunk(batch)


def test_adapters_have_layers_of_their_own_accord(checkpoint):
    pytest.importorskip("peft")
    policy = loaded_as_lerobot_does(checkpoint)
    adapted = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 2})
    learning = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert any("lam_projection" in name for name in learning)
    assert any("cond_encoder.1" in name for name in learning)
    assert all("lora" in name for name in learning)


def test_recordings_with_pauses_are_told(tmp_path, store, caplog, lam_folder):
    extra = {"intervention": {"dtype": "bool", "shape": (1,), "names": None}}
    paused = record_dataset(tmp_path / "data", lengths=(6, 5), extra=extra)
    build(live_config(lam_folder), paused)
    assert "'intervention'" in caplog.text
    assert "record_autonomous=true" in caplog.text
    assert paused.fps == FPS
