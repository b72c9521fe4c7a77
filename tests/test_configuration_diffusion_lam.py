import json

import draccus
import pytest
from lerobot.configs.policies import PreTrainedConfig

from lerobot_lam_diffusion import OBS_LAM_TOKENS, DiffusionLamConfig

LIVE = {"lam_model_path": "pusht-compact", "lam_camera_key": "observation.image", "device": "cpu"}
PRECOMPUTED = {"use_precomputed_lam_tokens": True, "device": "cpu"}


def test_registered_under_its_own_name():
    assert DiffusionLamConfig(**PRECOMPUTED).type == "diffusion_lam"
    assert PreTrainedConfig.get_choice_class("diffusion_lam") is DiffusionLamConfig


@pytest.mark.parametrize(
    ("fields", "dim"),
    [
        (PRECOMPUTED | {"lam_temporal_aggregation": "latest"}, 64),
        (PRECOMPUTED | {"lam_temporal_aggregation": "concat", "n_obs_steps": 3}, 192),
        (LIVE | {"lam_temporal_aggregation": "concat", "n_obs_steps": 3}, 128),
        (PRECOMPUTED | {"lam_num_learned_tokens": 4, "lam_action_latent_dim": 128}, 512),
        (PRECOMPUTED | {"use_lam_conditioning": False}, 0),
    ],
)
def test_conditioning_dim(fields, dim):
    assert DiffusionLamConfig(**fields).lam_conditioning_dim == dim


def test_a_saved_config_keeps_its_conditioning_steps_when_the_source_changes(tmp_path):
    config = DiffusionLamConfig(**PRECOMPUTED, n_obs_steps=3, lam_temporal_aggregation="concat")
    config._save_pretrained(tmp_path)
    switched = PreTrainedConfig.from_pretrained(
        tmp_path,
        cli_overrides=[
            "--use_precomputed_lam_tokens=false",
            "--lam_model_path=pusht-compact",
            "--lam_camera_key=observation.image",
        ],
    )
    assert switched.lam_conditioning_dim == config.lam_conditioning_dim == 192
    assert json.loads((tmp_path / "config.json").read_text())["lam_conditioning_steps"] == 3


def test_a_precomputed_checkpoint_with_one_observation_step_may_run_live():
    saved = DiffusionLamConfig(**PRECOMPUTED, n_obs_steps=1)
    DiffusionLamConfig(**LIVE, n_obs_steps=1, lam_conditioning_steps=saved.lam_conditioning_steps)


@pytest.mark.parametrize("paths", ["store", "[store]"])
def test_the_command_line_takes_one_store_or_a_list(paths):
    config = draccus.parse(
        DiffusionLamConfig,
        args=[f"--lam_tokens_path={paths}", "--use_precomputed_lam_tokens=true", "--device=cpu"],
    )
    assert config.lam_tokens_path == ("store" if paths == "store" else ["store"])


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (LIVE | {"lam_model_path": None}, ["--policy.lam_model_path"]),
        (LIVE | {"lam_camera_key": None}, ["--policy.lam_camera_key"]),
        (LIVE | {"n_obs_steps": 1}, ["n_obs_steps >= 2", "got 1"]),
        (PRECOMPUTED | {"lam_tokens_key": "lam"}, ["'lam'", "must start with 'observation.'"]),
        (PRECOMPUTED | {"lam_temporal_aggregation": "mean"}, ["'mean'", "'latest', 'concat'"]),
        (PRECOMPUTED | {"lam_dtype": "float16"}, ["'float16'", "'bfloat16'"]),
        (PRECOMPUTED | {"lam_frame_stride": 0}, ["lam_frame_stride=0"]),
        (PRECOMPUTED | {"lam_conditioning_steps": 2}, ["must be 1 with", "latest"]),
        (
            PRECOMPUTED | {"lam_conditioning_steps": 4, "lam_temporal_aggregation": "concat"},
            ["lam_conditioning_steps=4", "1..n_obs_steps=2"],
        ),
        (PRECOMPUTED | {"lam_tokens_path": ["a", "b"]}, ["lam_tokens_path has 2 entries"]),
        (
            {"device": "cpu", "n_obs_steps": 1, "lam_dtype": "int8"},
            ["4 problems", "1. lam_dtype", "lam_model_path", "lam_camera_key", "n_obs_steps"],
        ),
    ],
)
def test_contradictions_are_told_at_once(fields, messages):
    with pytest.raises(ValueError, match="diffusion_lam") as error:
        DiffusionLamConfig(**fields)
    for message in messages:
        assert message in str(error.value)


def test_without_conditioning_lam_fields_do_not_matter():
    DiffusionLamConfig(use_lam_conditioning=False, device="cpu", n_obs_steps=1)


def test_a_column_of_tokens_is_no_state_to_be_normalised():
    state = {"type": "STATE", "shape": [2]}
    image = {"type": "VISUAL", "shape": [3, 48, 48]}
    features = {
        "observation.state": state,
        "observation.image": image,
        OBS_LAM_TOKENS: state | {"shape": [64]},
    }
    config = draccus.decode(
        DiffusionLamConfig, {"use_precomputed_lam_tokens": True, "device": "cpu", "input_features": features}
    )
    config.validate_features()
    assert set(config.input_features) == {"observation.state", "observation.image"}
