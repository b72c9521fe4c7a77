"""Bad sources of tokens: one clear error each, while the policy is built, before anything trains."""

import copy
import dataclasses
import re
import shutil

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.dataset_tools import add_features, delete_episodes, recompute_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy

from lerobot_lam_diffusion import OBS_LAM_TOKENS, DiffusionLamPolicy
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.tokens.add_column import add_column
from tests.conftest import FPS, TOP, record_dataset, write_lam
from tests.policies import build, lam_config, training_batch

WRIST = "observation.images.wrist"


@pytest.fixture(scope="module")
def with_column(dataset, store, tmp_path_factory):
    """The dataset with its tokens as a native column."""
    tokens = store.window(torch.arange(len(dataset)), [0])[:, 0].numpy()
    feature = {"dtype": "float32", "shape": (64,), "names": None}
    return add_features(
        dataset,
        features={OBS_LAM_TOKENS: (tokens, feature)},
        output_dir=tmp_path_factory.mktemp("column") / "data",
        repo_id="local/column",
    )


@pytest.fixture(scope="module")
def with_known_column(dataset, store, tmp_path_factory):
    """The same as `lerobot-lam-tokens add-column` makes it."""
    made = add_column(store, dataset.meta, tmp_path_factory.mktemp("known") / "data")
    return LeRobotDataset("local/known", root=made.root, video_backend="pyav", return_uint8=True)


def refused(dataset, *messages, **fields):
    with pytest.raises(UserError) as error:
        build(lam_config(**fields), dataset)
    for message in messages:
        assert message in str(error.value), str(error.value)


def test_no_source(dataset):
    refused(
        dataset,
        "no column 'observation.lam_tokens'",
        "--policy.lam_tokens_path is unset",
        "lerobot-lam-precompute --dataset.repo_id=local/squares",
    )


def test_missing_store(dataset, tmp_path):
    refused(
        dataset,
        f"no token store at {tmp_path / 'nowhere'}",
        "lerobot-lam-precompute",
        lam_tokens_path=str(tmp_path / "nowhere"),
    )


def test_truncated_store(dataset, store, tmp_path):
    shutil.copytree(store.path, tmp_path / "store")
    file = tmp_path / "store" / "lam_tokens.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    refused(dataset, "lam_tokens.safetensors is damaged", lam_tokens_path=str(tmp_path / "store"))


def test_store_of_another_dataset(store, tmp_path):
    other = record_dataset(tmp_path / "other", seed=1)
    refused(other, "does not belong to dataset", "episodes differ", lam_tokens_path=str(store.path))


def test_store_of_an_edited_dataset(dataset, store, tmp_path):
    edited = delete_episodes(dataset, [0], output_dir=tmp_path / "edited", repo_id="local/edited")
    refused(edited, "60 frames, the dataset 46", "5 episodes, the dataset 4", lam_tokens_path=str(store.path))


def test_path_and_column_at_once(with_column, store):
    refused(with_column, "two sources of LAM tokens", str(store.path), "'observation.lam_tokens'",
            lam_tokens_path=str(store.path))  # fmt: skip


def test_column_of_another_width(with_column):
    refused(with_column, "shape (64,)", "expects (96,)", "lam_num_learned_tokens", lam_num_learned_tokens=3)


def test_fields_that_contradict_the_store_are_told_at_once(dataset, store):
    refused(
        dataset,
        "5 problems",
        "lam_frame_stride is 3, the store has 1",
        "lam_num_learned_tokens is 4, the store has 2",
        "lam_action_latent_dim is 16, the store has 32",
        "the policy was trained with abc…: train on a store of that LAM.",
        "it holds vq tokens: pass --policy.lam_use_vq_tokens=true",
        lam_tokens_path=str(store.path),
        lam_frame_stride=3,
        lam_num_learned_tokens=4,
        lam_action_latent_dim=16,
        lam_fingerprint="abc",
        lam_use_vq_tokens=False,
    )


def test_fields_that_contradict_the_column_are_told_as_for_a_store(with_known_column):
    refused(
        with_known_column,
        "column 'observation.lam_tokens' of dataset 'local/known' does not fit the policy; 5 problems",
        "lam_frame_stride is 3, the column has 1",
        "lam_num_learned_tokens is 4, the column has 2",
        "lam_action_latent_dim is 16, the column has 32",
        "the policy was trained with abc…: train on a column of that LAM",
        "it holds vq tokens: pass --policy.lam_use_vq_tokens=true",
        lam_frame_stride=3,
        lam_num_learned_tokens=4,
        lam_action_latent_dim=16,
        lam_fingerprint="abc",
        lam_use_vq_tokens=False,
    )


def test_a_column_tells_the_policy_what_a_store_tells(dataset, with_known_column, store, caplog):
    caplog.set_level("INFO")
    of_store, _ = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    of_column, _ = build(lam_config(), with_known_column)
    assert "the dataset's column observation.lam_tokens (its rows are as they were extracted)" in caplog.text
    assert "Training goes on" not in caplog.text
    by_store, by_column = (dataclasses.asdict(policy.config) for policy in (of_store, of_column))
    assert {name for name in by_store if by_store[name] != by_column[name]} == {
        "lam_source",
        "lam_tokens_path",
    }
    assert of_column.config.lam_source == "column:observation.lam_tokens"
    assert of_column.config.lam_fingerprint == store.provenance.lam.fingerprint
    assert of_column.config.lam_fps == FPS


def test_a_derived_column_still_tells(with_known_column, store, tmp_path, caplog):
    caplog.set_level("INFO")
    edited = delete_episodes(with_known_column, [0], output_dir=tmp_path / "edited", repo_id="local/edited")
    policy, _ = build(lam_config(), edited)
    assert "(derived: meta/lam_tokens.json says nothing about it" in caplog.text
    assert policy.config.lam_fingerprint == store.provenance.lam.fingerprint
    assert policy.config.lam_token_scale == store.provenance.lam.token_scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format_version": 99},
            "has format version 99; this lerobot_policy_diffusion_lam reads versions up",
        ),
        ({"frame_stride": 0}, "frame_stride is 0, expected a positive integer"),
        ({"lam": {}}, "is damaged: lam.path is missing"),
    ],
)
def test_a_damaged_column_is_refused(with_known_column, change, message):
    meta = copy.deepcopy(with_known_column.meta)
    meta.features[OBS_LAM_TOKENS]["info"] |= change
    with pytest.raises(UserError, match=re.escape(message)):
        make_policy(lam_config(), ds_meta=meta)


def test_continuous_store_names_the_flag(dataset, continuous_store):
    refused(dataset, "--policy.lam_use_vq_tokens=false", lam_tokens_path=str(continuous_store.path))


def test_two_cameras_one_of_which_the_store_saw(tmp_path, make_store):
    cameras = ("observation.images.top", "observation.images.wrist")
    both = record_dataset(tmp_path / "both", lengths=(6, 5), cameras=cameras)
    store = make_store(both, camera_key="observation.images.wrist")
    refused(both, "lam_camera_key is observation.images.top, the store has observation.images.wrist",
            lam_tokens_path=str(store.path), lam_camera_key="observation.images.top")  # fmt: skip
    policy, _ = build(lam_config(lam_tokens_path=str(store.path)), both)
    assert policy.config.lam_camera_key == "observation.images.wrist"


def test_partial_store_warns_and_the_batch_names_episode_and_frame(dataset, make_store, caplog):
    some = LeRobotDataset("local/squares", root=dataset.root, episodes=[1, 3], return_uint8=True)
    store = make_store(some)
    policy, preprocess = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    assert "2 of 5 episodes (1, 3)" in caplog.text
    covered = preprocess(training_batch(policy.config, dataset, [14, 41]))
    assert torch.isfinite(policy.forward(covered)[0])
    with pytest.raises(ValueError, match=r"lacks episode 2, which frame 30 belongs to; .*--dataset.episodes"):
        policy.forward(preprocess(training_batch(policy.config, dataset, [14, 30])))


def test_the_scale_of_a_checkpoint_never_changes(dataset, with_column, store, lam_folder, tmp_path):
    """A column tells no codebook, so its tokens are not scaled: neither are the same policy's live ones."""
    policy, _ = build(lam_config(), with_column)
    assert policy.config.lam_token_scale == 1.0
    policy.save_pretrained(tmp_path)
    live = ["--use_precomputed_lam_tokens=false", f"--lam_model_path={lam_folder}", f"--lam_camera_key={TOP}"]
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=live)
    assert DiffusionLamPolicy.from_pretrained(tmp_path, config=config).config.lam_token_scale == 1.0
    tuned = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=[f"--lam_tokens_path={store.path}"])
    build(tuned, dataset)
    assert tuned.lam_token_scale == 1.0


def test_the_camera_is_not_guessed(tmp_path, make_store, caplog):
    """The store saw the top camera, the policy only sees the wrist: that is not the same camera."""
    both = record_dataset(tmp_path / "both", lengths=(6, 5), cameras=(TOP, WRIST))
    store = make_store(both, camera_key=TOP)
    vector = PolicyFeature(FeatureType.STATE, (2,))
    picture = PolicyFeature(FeatureType.VISUAL, (3, 48, 48))
    seen = {"observation.state": vector, "observation.images.front": picture}
    config = lam_config(lam_tokens_path=str(store.path), input_features=seen)
    make_policy(config, ds_meta=both.meta, rename_map={WRIST: "observation.images.front"})
    assert config.lam_camera_key is None
    assert "not known which of the policy's cameras" in caplog.text
    caplog.clear()
    seen = {"observation.state": vector, WRIST: picture}
    config = lam_config(lam_tokens_path=str(store.path), input_features=seen)
    make_policy(config, ds_meta=both.meta)
    assert config.lam_camera_key == TOP  # which is no input of the policy; nothing is renamed
    assert "Training goes on" not in caplog.text


def test_a_store_of_another_lam_is_refused_or_adopted_as_a_whole(
    dataset, make_store, store, frames, tmp_path
):
    policy, _ = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    other = write_lam(tmp_path / "other", frames, seed=9)
    theirs = precompute_tokens(
        dataset,
        load_lam(other),
        tmp_path / "theirs",
        camera_key=TOP,
        lam_path=str(other),
        show_progress=False,
    ).store
    config = policy.config
    config.lam_tokens_path = str(theirs.path)
    with pytest.raises(UserError, match=r"was trained with .*--policy.lam_allow_mismatch=true"):
        build(config, dataset)
    config.lam_allow_mismatch = True
    build(config, dataset)
    assert config.lam_model_path == str(other)
    assert config.lam_fingerprint == theirs.provenance.lam.fingerprint
    assert config.lam_allow_mismatch is False


def test_a_lam_that_is_not_here_is_told_before_training(dataset, store, with_column, caplog):
    build(lam_config(lam_tokens_path=str(store.path)), dataset)
    assert "Training goes on" not in caplog.text
    build(lam_config(lam_tokens_path=str(store.path), lam_model_path="/nowhere/lam"), dataset)
    assert "not at /nowhere/lam. Training goes on" in caplog.text
    caplog.clear()
    build(lam_config(), with_column)
    assert "is not known. Training goes on" in caplog.text
    assert "--policy.lam_model_path" in caplog.text


def test_a_misspelt_camera_beside_a_store_is_refused(dataset, store):
    config = lam_config(lam_tokens_path=str(store.path), lam_camera_key="observation.images.tpo")
    with pytest.raises(ValueError, match=f"observation.images.tpo, the store has {TOP}: leave that flag out"):
        build(config, dataset)


@pytest.mark.parametrize("with_stats", [False, True])
def test_column_and_store_give_the_same_loss(dataset, with_column, store, with_stats):
    """Also where the dataset has statistics for the column, by which LeRobot would normalise it."""
    if with_stats:
        statistics = {"min": -1, "max": 3, "mean": 0.5, "std": 2, "count": 60}
        with_column.meta.stats[OBS_LAM_TOKENS] = {
            name: torch.full((64,), float(value)).numpy() for name, value in statistics.items()
        }
    losses = []
    for source, fields in ((dataset, {"lam_tokens_path": str(store.path)}), (with_column, {})):
        config = lam_config(**fields, lam_temporal_aggregation="concat")
        policy, preprocess = build(config, source)
        policy.config.lam_token_scale = store.provenance.lam.token_scale
        make_lam_weights_matter(policy)
        batch = preprocess(training_batch(policy.config, source, [1, 20, 30]))
        torch.manual_seed(0)
        losses.append(policy.forward(batch)[0].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["store", "continuous_store"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_an_added_column_and_its_store_give_the_same_loss(dataset, kind, recomputed, request, tmp_path):
    """Nothing is told to the policy but where the tokens are."""
    store = request.getfixturevalue(kind)
    made = add_column(store, dataset.meta, tmp_path / "data")
    added = LeRobotDataset("local/added", root=made.root, video_backend="pyav", return_uint8=True)
    if recomputed:
        recompute_stats(added)
        added = LeRobotDataset("local/added", root=made.root, video_backend="pyav", return_uint8=True)
    assert OBS_LAM_TOKENS in added.meta.stats
    losses = []
    for source, fields in ((dataset, {"lam_tokens_path": str(store.path)}), (added, {})):
        fields |= {"lam_temporal_aggregation": "concat", "lam_use_vq_tokens": kind == "store"}
        policy, preprocess = build(lam_config(**fields), source)
        make_lam_weights_matter(policy)
        batch = preprocess(training_batch(policy.config, source, [0, 1, 20, 30]))
        torch.manual_seed(0)
        losses.append(policy.forward(batch)[0].item())
    assert losses[0] == losses[1]


def make_lam_weights_matter(policy):
    torch.manual_seed(3)
    for name, parameter in policy.named_parameters():
        if name.endswith("cond_encoder.lam.weight"):
            torch.nn.init.normal_(parameter)
