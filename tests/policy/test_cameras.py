"""Fine-tuning under a `--rename_map`: tokens are of the camera that the policy will see, or are refused."""

import logging
import shutil

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors

from lerobot_lam_diffusion import OBS_LAM_TOKENS
from lerobot_lam_diffusion.constants import OBS_LAM_CAMERAS
from lerobot_lam_diffusion.tokens.add_column import add_column
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import TOP, record_dataset
from tests.policies import build, lam_config, training_batch

WRIST = "observation.images.wrist"
SWAP = {TOP: WRIST, WRIST: TOP}
ROWS = [1, 2, 7, 8, 10]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """17 frames in 2 episodes, two cameras whose pictures differ."""
    return record_dataset(tmp_path_factory.mktemp("both") / "data", lengths=(9, 8), cameras=(TOP, WRIST))


@pytest.fixture(scope="module")
def stores(both, make_store):
    return {camera: make_store(both, camera_key=camera) for camera in (TOP, WRIST)}


@pytest.fixture(scope="module")
def checkpoint(both, stores, tmp_path_factory):
    """Trained (one batch) on tokens of the top camera, saved as `lerobot-train` saves it."""
    folder = tmp_path_factory.mktemp("run")
    policy, preprocess = build(lam_config(lam_tokens_path=str(stores[TOP].path)), both)
    policy.forward(preprocess(training_batch(policy.config, both, ROWS)))
    policy.save_pretrained(folder)
    preprocess.save_pretrained(folder, config_filename="policy_preprocessor.json")
    assert policy.config.lam_camera_key == TOP
    assert policy.config.lam_frame_size == "48x48"
    return folder


def fine_tune(checkpoint, dataset, rename_map, *overrides):
    """Policy and pre-processed batch, as `lerobot-train --policy.path=… --rename_map=…` makes them."""
    config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=list(overrides))
    config.pretrained_path = checkpoint
    policy = make_policy(config, ds_meta=dataset.meta, rename_map=rename_map)
    preprocess, _ = make_pre_post_processors(
        config,
        pretrained_path=checkpoint,
        postprocessor_config_filename="policy_preprocessor.json",
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "rename_observations_processor": {"rename_map": rename_map},
        },
        postprocessor_overrides={},
    )
    windowed = LeRobotDataset(
        dataset.repo_id,
        root=dataset.root,
        delta_timestamps=resolve_delta_timestamps(config, dataset.meta),
        video_backend="pyav",
    )
    batch = preprocess(torch.utils.data.default_collate([windowed[row] for row in ROWS]))
    return policy, batch


def conditioned_on(policy, batch):
    """The tokens `(B, T, n·a)` that a training step uses."""
    return policy._with_window_tokens(batch)[OBS_LAM_TOKENS]


def test_the_pre_processor_tells_the_names(checkpoint, both):
    _, batch = fine_tune(checkpoint, both, SWAP, "--lam_tokens_path=auto")
    assert batch[OBS_LAM_CAMERAS] == SWAP
    _, batch = fine_tune(checkpoint, both, {})
    assert batch[OBS_LAM_CAMERAS] == {TOP: TOP, WRIST: WRIST}


def test_a_store_of_the_exchanged_camera_is_refused_and_the_right_one_accepted(checkpoint, both, stores):
    policy, batch = fine_tune(checkpoint, both, SWAP)  # the checkpoint's own store, of the top camera
    with pytest.raises(UserError, match=f"camera {TOP}, and --policy.lam_camera_key={TOP} is its {WRIST}"):
        policy.forward(batch)
    with pytest.raises(UserError, match="tokens of another camera"):  # as often as it is asked
        policy.forward(batch)
    policy, batch = fine_tune(checkpoint, both, SWAP, f"--lam_tokens_path={stores[WRIST].path}")
    expected = stores[WRIST].window(torch.tensor(ROWS), policy.config.lam_token_deltas)
    assert torch.equal(conditioned_on(policy, batch), expected)
    assert policy.config.lam_camera_key == TOP  # where the robot's frames of that camera will arrive
    assert torch.isfinite(policy.forward(batch)[0])


def test_without_a_rename_map_the_store_of_the_other_camera_is_refused(checkpoint, both, stores):
    policy, batch = fine_tune(checkpoint, both, {}, f"--lam_tokens_path={stores[WRIST].path}")
    with pytest.raises(UserError, match=f"--policy.lam_camera_key={TOP} is its {TOP} here"):
        policy.forward(batch)
    policy, batch = fine_tune(checkpoint, both, {})
    expected = stores[TOP].window(torch.tensor(ROWS), policy.config.lam_token_deltas)
    assert torch.equal(conditioned_on(policy, batch), expected)


def test_new_names_are_understood_too(checkpoint, both, tmp_path):
    """Neither name is one of the dataset's: only the pre-processor knows."""
    front, side = "observation.images.front", "observation.images.side"
    renamed = {TOP: side, WRIST: front}
    shutil.copytree(checkpoint, tmp_path / "run")
    saved = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(saved.replace(TOP, side).replace(WRIST, front))
    policy, batch = fine_tune(tmp_path / "run", both, renamed, f"--lam_camera_key={front}")
    with pytest.raises(UserError, match=f"camera {TOP}, and --policy.lam_camera_key={front} is its {WRIST}"):
        policy.forward(batch)
    policy, batch = fine_tune(tmp_path / "run", both, renamed)
    assert policy.config.lam_camera_key == side
    assert torch.isfinite(policy.forward(batch)[0])


@pytest.mark.slow
@pytest.mark.parametrize("rename_map", [{}, SWAP], ids=["same names", "exchanged"])
def test_auto_builds_the_tokens_of_the_camera_that_the_policy_sees(
    checkpoint, both, stores, lam_folder, rename_map, home
):
    policy, batch = fine_tune(checkpoint, both, rename_map, "--lam_tokens_path=auto")
    camera = rename_map.get(TOP, TOP)
    expected = stores[camera].window(torch.tensor(ROWS), policy.config.lam_token_deltas)
    assert torch.equal(conditioned_on(policy, batch), expected)
    assert policy.token_store.provenance.camera_key == camera
    assert len(list(home.rglob("lam_tokens.safetensors"))) == 1  # and no store of the other camera


def test_the_live_cache_is_that_of_the_camera_that_the_policy_sees(checkpoint, both, tmp_path):
    on_the_fly = ["--use_precomputed_lam_tokens=false", f"--lam_live_cache={tmp_path}"]
    policy, batch = fine_tune(checkpoint, both, SWAP, *on_the_fly)
    policy.forward(batch)
    (live,) = policy.live_tokens.lams
    assert live.cache._pairs.provenance.camera_key == WRIST
    assert any(len(frames) for frames, _, _ in live.cache._pairs.scan())


def test_a_column_of_the_exchanged_camera_is_refused(checkpoint, both, stores, tmp_path):
    made = add_column(stores[TOP], both.meta, tmp_path / "data")
    with_column = LeRobotDataset("local/known", root=made.root, video_backend="pyav", return_uint8=True)
    policy, batch = fine_tune(checkpoint, with_column, SWAP, "--lam_tokens_path=null")
    with pytest.raises(UserError, match="tokens of another camera"):
        policy.forward(batch)
    policy, batch = fine_tune(checkpoint, with_column, {}, "--lam_tokens_path=null")
    assert torch.isfinite(policy.forward(batch)[0])


def test_a_batch_without_names_is_told(checkpoint, both, caplog):
    policy, batch = fine_tune(checkpoint, both, {})
    del batch[OBS_LAM_CAMERAS]  # as a checkpoint of an earlier version has no such step
    with caplog.at_level(logging.WARNING):
        policy.forward(batch)
        policy.forward(batch)
    assert caplog.text.count("does not tell which of the dataset's cameras") == 1
