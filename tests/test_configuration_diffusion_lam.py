import json
from dataclasses import replace

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


LISTS = {
    "lam_tokens_path": ["a", "user/b@main"],
    "lam_camera_key": ["observation.images.top", None],
    "lam_model_path": [None, "pusht-compact"],
    "lam_num_learned_tokens": [2, 4],
    "lam_action_latent_dim": [32, None],
    "lam_token_scale": [0.5, 1.0],
}


def test_lists_from_the_command_line_and_from_a_checkpoint(tmp_path):
    args = [f"--{name}={str(value).replace('None', 'null')}" for name, value in LISTS.items()]
    config = draccus.parse(
        DiffusionLamConfig, args=[*args, "--device=cpu", "--use_precomputed_lam_tokens=true"]
    )
    config._save_pretrained(tmp_path)
    for told in (config, PreTrainedConfig.from_pretrained(tmp_path)):
        assert {name: getattr(told, name) for name in LISTS} == LISTS
        assert told.lam_token_dim == 2 * 32 + 4 * 32
        first, second = told.token_sources
        assert (first.tokens_path, second.tokens_path) == ("a", "user/b@main")
        assert (first.token_dim, second.token_dim) == (64, 128)
        assert second.camera_key is None
    sources = told.token_sources
    told.set_token_sources([replace(source, token_scale=2.0, origin="x") for source in sources])
    assert (told.lam_token_scale, told.lam_source) == ([2.0, 2.0], ["x", "x"])
    assert told.lam_fingerprint is None


def test_lists_over_a_checkpoint_need_no_quotation_marks(tmp_path):
    """LeRobot reads the flags beside `--policy.path` as JSON."""
    DiffusionLamConfig(**PRECOMPUTED)._save_pretrained(tmp_path)
    overrides = [
        "--lam_tokens_path=[./a, user/b@main]",
        '--lam_camera_key=["c", null]',
        "--lam_model_path=[x]",
    ]
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=overrides)
    assert config.lam_tokens_path == ["./a", "user/b@main"]
    assert config.lam_camera_key == ["c", None]
    assert config.lam_model_path == ["x"]


def test_plain_values_stay_plain(tmp_path):
    """In the config of one source, and where one value counts for all sources."""
    scalars = {"lam_num_learned_tokens": 4, "lam_action_latent_dim": 8, "lam_token_scale": 0.5}
    args = [f"--{name}={value}" for name, value in scalars.items()]
    config = draccus.parse(
        DiffusionLamConfig, args=[*args, "--device=cpu", "--use_precomputed_lam_tokens=true"]
    )
    config.set_token_sources(config.token_sources)
    config._save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in scalars} == scalars
    assert saved["lam_tokens_path"] is None
    assert [type(getattr(config, name)) for name in scalars] == [int, int, float]
    one = DiffusionLamConfig(**LIVE | {"lam_camera_key": ["c"], "lam_num_learned_tokens": [3]})
    assert one.lam_token_dim == 96
    assert [source.camera_key for source in one.token_sources] == ["c"]
    shared = DiffusionLamConfig(**LIVE | {"lam_camera_key": ["c", "d"]})
    shared.set_token_sources(shared.token_sources)
    assert shared.lam_model_path == "pusht-compact"
    assert shared.lam_token_dim == 128


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (LIVE | {"lam_model_path": None}, ["--policy.lam_model_path"]),
        (LIVE | {"lam_camera_key": None}, ["--policy.lam_camera_key"]),
        (
            LIVE | {"n_obs_steps": 1, "lam_temporal_aggregation": "concat"},
            ["n_obs_steps >= 2", "got 1"],
        ),
        (PRECOMPUTED | {"lam_tokens_key": "lam"}, ["'lam'", "must start with 'observation.'"]),
        (PRECOMPUTED | {"lam_temporal_aggregation": "mean"}, ["'mean'", "'latest', 'concat'"]),
        (PRECOMPUTED | {"lam_dtype": "float16"}, ["'float16'", "'bfloat16'"]),
        (PRECOMPUTED | {"lam_frame_stride": 0}, ["lam_frame_stride=0"]),
        (PRECOMPUTED | {"lam_conditioning_steps": 2}, ["must be 1 with", "latest"]),
        (
            PRECOMPUTED | {"lam_conditioning_steps": 4, "lam_temporal_aggregation": "concat"},
            ["lam_conditioning_steps=4", "1..n_obs_steps=2"],
        ),
        (
            PRECOMPUTED | {"lam_tokens_path": ["a", "b"], "lam_camera_key": ["c", "d", "e"]},
            ["lam_tokens_path has 2, lam_camera_key has 3", "one plain value that counts for all of them"],
        ),
        (
            PRECOMPUTED | {"lam_tokens_path": ["a", "a"], "lam_model_path": [], "lam_fingerprint": []},
            ["2 problems", "lam_model_path is an empty list", "lam_fingerprint is an empty list"],
        ),
        (
            PRECOMPUTED | {"lam_tokens_path": ["a", "b", "a"], "lam_action_latent_dim": [8, 0, 8]},
            [
                "sources 1 and 3 have the same token store, lam_tokens_path=a",
                "lam_action_latent_dim=[8, 0, 8]",
            ],
        ),
        (
            PRECOMPUTED | {"lam_tokens_path": "a", "lam_camera_key": ["c", "d"]},
            ["sources 1 and 2 have the same token store, lam_tokens_path=a"],
        ),
        (PRECOMPUTED | {"lam_tokens_path": ["a", None]}, ["lam_tokens_path has an empty entry"]),
        (
            PRECOMPUTED | {"lam_tokens_path": ["auto", "b"]},
            ["mixes 'auto' and token stores", "needs --policy.lam_model_path"],
        ),
        (
            LIVE | {"lam_camera_key": ["c", "d", "c"]},
            ["sources 1 and 3 are the same: lam_camera_key=c, lam_model_path=pusht-compact"],
        ),
        (LIVE | {"lam_camera_key": ["c", None]}, ["need the LAM's camera"]),
        (
            {"device": "cpu", "n_obs_steps": 1, "lam_dtype": "int8"},
            ["2 problems", "1. lam_dtype", "lam_model_path", "lam_camera_key"],
        ),
        (
            {"device": "cpu", "n_obs_steps": 1, "lam_temporal_aggregation": "concat", "lam_camera_key": "c"},
            ["2 problems", "need a LAM", "got 1"],
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
