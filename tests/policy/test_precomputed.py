"""Sources of precomputed tokens: what they say enters the config; bad ones are refused before training."""

import copy
import dataclasses
import json
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
from lerobot_lam_diffusion.tokens.add_column import add_column
from lerobot_lam_diffusion.tokens.export import export_store
from tests.conftest import FPS, TOP, record_dataset, write_lam
from tests.policies import build, lam_config, make_lam_weights_matter, refused, training_batch

WRIST = "observation.images.wrist"
CONTRADICTIONS = {
    "lam_frame_stride": 3,
    "lam_num_learned_tokens": 4,
    "lam_action_latent_dim": 16,
    "lam_fingerprint": "abc",
    "lam_use_vq_tokens": False,
}


def opened(root):
    return LeRobotDataset("local/known", root=root, video_backend="pyav", return_uint8=True)


@pytest.fixture(scope="module")
def with_column(dataset, store, tmp_path_factory):
    """The dataset with its tokens as a native column of the user's own making."""
    tokens = store.window(torch.arange(len(dataset)), [0])[:, 0].numpy()
    feature = {"dtype": "float32", "shape": (64,), "names": None}
    folder = tmp_path_factory.mktemp("column") / "data"
    return add_features(
        dataset, {OBS_LAM_TOKENS: (tokens, feature)}, output_dir=folder, repo_id="local/column"
    )


@pytest.fixture(scope="module")
def with_known_column(dataset, store, tmp_path_factory):
    """The same as `lerobot-lam-tokens add-column` makes it."""
    return opened(add_column(store, dataset.meta, tmp_path_factory.mktemp("known") / "data").root)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two cameras."""
    return record_dataset(tmp_path_factory.mktemp("both") / "data", lengths=(6, 5), cameras=(TOP, WRIST))


# Each bad source is one clear error that names what was found, what was expected and what to do.


def test_no_source(dataset):
    with refused(
        "no column 'observation.lam_tokens'",
        "--policy.lam_tokens_path is unset",
        "lerobot-lam-precompute --dataset.repo_id=local/squares",
    ):
        build(lam_config(), dataset)


def test_stores_that_cannot_be_used(dataset, store, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    with refused(f"no token store at {nowhere}", "lerobot-lam-precompute"):
        build(lam_config(lam_tokens_path=nowhere), dataset)
    shutil.copytree(store.path, tmp_path / "store")
    file = tmp_path / "store" / "lam_tokens.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with refused("lam_tokens.safetensors is damaged"):
        build(lam_config(lam_tokens_path=str(tmp_path / "store")), dataset)
    other = record_dataset(tmp_path / "other", seed=1)
    with refused("does not belong to dataset", "episodes differ"):
        build(lam_config(lam_tokens_path=str(store.path)), other)
    edited = delete_episodes(dataset, [0], output_dir=tmp_path / "edited", repo_id="local/edited")
    with refused("60 frames, the dataset 46", "5 episodes, the dataset 4"):
        build(lam_config(lam_tokens_path=str(store.path)), edited)


def test_columns_that_cannot_be_used(with_column, store):
    with refused("two sources of LAM tokens", str(store.path), "'observation.lam_tokens'"):
        build(lam_config(lam_tokens_path=str(store.path)), with_column)
    with refused("shape (64,)", "expects (96,)", "lam_num_learned_tokens"):
        build(lam_config(lam_num_learned_tokens=3), with_column)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format_version": 99},
            "has format version 99; this lerobot_policy_diffusion_lam reads versions up",
        ),
        ({"frame_stride": 0}, "frame_stride is 0, which no store has"),
        ({"lam": {}}, "is damaged: lam.path is missing"),
    ],
)
def test_a_damaged_column_is_refused(with_known_column, change, message):
    meta = copy.deepcopy(with_known_column.meta)
    meta.features[OBS_LAM_TOKENS]["info"] |= change
    with refused(message):
        make_policy(lam_config(), ds_meta=meta)


@pytest.mark.parametrize("noun", ["store", "column"])
def test_fields_that_contradict_the_tokens_are_listed_at_once(dataset, with_known_column, store, noun):
    fields = {"lam_tokens_path": str(store.path)} if noun == "store" else {}
    with refused(
        "does not fit the policy; 5 problems",
        f"lam_frame_stride is 3, the {noun} has 1",
        f"lam_num_learned_tokens is 4, the {noun} has 2",
        f"lam_action_latent_dim is 16, the {noun} has 32",
        "the policy was trained with abc…: use that LAM, or its tokens",
        "it holds vq tokens: pass --policy.lam_use_vq_tokens=true",
    ):
        build(lam_config(**fields, **CONTRADICTIONS), dataset if fields else with_known_column)


def test_a_continuous_store_names_the_flag(dataset, continuous_store):
    with refused("--policy.lam_use_vq_tokens=false"):
        build(lam_config(lam_tokens_path=str(continuous_store.path)), dataset)


# What tokens say of themselves enters the config and the checkpoint.


def test_a_column_tells_the_policy_what_a_store_tells(dataset, with_known_column, store, caplog):
    caplog.set_level("INFO")
    of_store, _ = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    of_column, _ = build(lam_config(), with_known_column)
    assert "the dataset's column observation.lam_tokens (its rows are as they were extracted)" in caplog.text
    assert "Training goes on" not in caplog.text
    by_store, by_column = (dataclasses.asdict(policy.config) for policy in (of_store, of_column))
    different = {name for name in by_store if by_store[name] != by_column[name]}
    assert different == {"lam_source", "lam_tokens_path"}
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
    assert "may hold the tokens of other frames" not in caplog.text  # its rows still are their frames'


def test_a_column_whose_dataset_has_changed_under_it_warns(with_known_column, tmp_path, caplog):
    root = shutil.copytree(with_known_column.root, tmp_path / "changed")
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"][TOP]["info"]["video.codec"] = "another"
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (video,) = (root / "videos").rglob("*.mp4")
    video.write_bytes(video.read_bytes() + b"0")
    build(lam_config(), opened(root))
    assert f"may hold the tokens of other frames: the video of {TOP} was encoded again" in caplog.text


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


def test_a_store_of_another_lam_is_refused_or_adopted_as_a_whole(dataset, store, frames, tmp_path):
    config = build(lam_config(lam_tokens_path=str(store.path)), dataset)[0].config
    other = write_lam(tmp_path / "other", frames, seed=9)
    made = {"camera_key": TOP, "lam_path": str(other), "show_progress": False}
    theirs = precompute_tokens(dataset, load_lam(other), tmp_path / "theirs", **made).store
    config.lam_tokens_path = str(theirs.path)
    with refused("was trained with", "--policy.lam_allow_mismatch=true"):
        build(config, dataset)
    config.lam_allow_mismatch = True
    build(config, dataset)
    assert config.lam_model_path == str(other)
    assert config.lam_fingerprint == theirs.provenance.lam.fingerprint
    assert config.lam_allow_mismatch is False


def test_a_fresh_policy_that_names_another_lam_is_refused_before_training(dataset, store, frames, tmp_path):
    """Else an evaluation would refuse it, hours later."""
    other = write_lam(tmp_path / "other", frames, seed=9)
    fields = {"lam_tokens_path": str(store.path), "lam_model_path": str(other)}
    with refused(f"--policy.lam_model_path={other} has the fingerprint", "the LAM of the store"):
        build(lam_config(**fields), dataset)
    build(lam_config(**fields, lam_allow_mismatch=True), dataset)


def test_fine_tuning_at_another_frame_rate_is_told(dataset, store, caplog):
    config = build(lam_config(lam_tokens_path=str(store.path)), dataset)[0].config
    build(config, dataset)
    assert "frames per second" not in caplog.text
    config.lam_fps = 3 * FPS
    build(config, dataset)
    assert f"trained at {3 * FPS:g} frames per second, dataset 'local/squares' has {FPS:g}" in caplog.text


def test_a_policy_built_without_its_dataset_is_told_that_nothing_is_checked(store, caplog):
    features = {
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        TOP: PolicyFeature(FeatureType.VISUAL, (3, 48, 48)),
    }
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    DiffusionLamPolicy(
        lam_config(lam_tokens_path=str(store.path), input_features=features, output_features=outputs)
    )
    assert f"lam_tokens_path={store.path} is not checked against a dataset" in caplog.text


@pytest.mark.parametrize(("deltas", "factor"), [([0], 1.0), ([1], 1.0), ([0], 0.5)])
def test_tokens_in_the_batch_that_are_not_the_stores_are_told(dataset, store, deltas, factor, caplog):
    policy, preprocess = build(lam_config(lam_tokens_path=str(store.path), lam_token_offsets=[1]), dataset)
    batch = preprocess(training_batch(policy.config, dataset, [14, 30]))
    batch[OBS_LAM_TOKENS] = factor * store.window(batch["index"], deltas, ahead=max(deltas) > 0)
    batch[OBS_LAM_TOKENS][0] = 0  # masked
    policy.forward(batch)
    policy.forward(batch)
    assert caplog.text.count("at the frame offsets [1], which the policy") == ((deltas, factor) != ([1], 1.0))


def test_training_on_a_pt_file(dataset, store, tmp_path, caplog):
    """It says nothing of its LAM: no fingerprint, and its tokens are not scaled unless the user says so."""
    export_store(store, tmp_path / "tokens.pt", "pt")
    for scale in (None, 0.5):
        config = lam_config(lam_tokens_path=str(tmp_path / "tokens.pt"), lam_token_scale=scale)
        policy, preprocess = build(config, dataset)
        assert (config.lam_fingerprint, config.lam_token_scale) == (None, scale or 1.0)
        tokens = policy._window_tokens(preprocess(training_batch(config, dataset, [20, 40])))
        assert torch.equal(tokens[:, 0], store.window(torch.tensor([20, 40]), [0])[:, 0])
    assert "is unverified: a .pt file says nothing reliable" in caplog.text


def test_features_of_ones_own_in_a_column(dataset, tmp_path):
    """As the guide's FAQ has it: any column of vectors, and at deployment the same key in the batch."""
    key, feature = "observation.flow", {"dtype": "float32", "shape": (3,), "names": None}
    values = torch.randn(len(dataset), 3).numpy()
    own = add_features(dataset, {key: (values, feature)}, output_dir=tmp_path / "own", repo_id="local/own")
    config = lam_config(
        lam_tokens_key=key, lam_num_learned_tokens=1, lam_action_latent_dim=3, num_inference_steps=1
    )
    policy, preprocess = build(config, own)
    batch = preprocess(training_batch(config, own, [20, 40]))
    loss, figures = policy.forward(batch)
    assert loss.isfinite()
    assert figures["lam_token_share"] == 1.0
    assert figures["lam_norm_ratio"] == 0.0  # a policy starts as the stock one
    assert figures["lam_shuffled_loss_ratio"] == 1.0
    policy.eval()
    item = own[20]
    frame = preprocess(
        {"observation.state": item["observation.state"], TOP: item[TOP] / 255, key: item[key][None]}
    )
    assert policy.select_action(frame).shape == (1, 2)


# The camera is the one that the tokens are of; it is never guessed.


def test_one_of_two_cameras(both, make_store):
    path = str(make_store(both, camera_key=WRIST).path)
    with refused(f"lam_camera_key is {TOP}, the store has {WRIST}"):
        build(lam_config(lam_tokens_path=path, lam_camera_key=TOP), both)
    policy, _ = build(lam_config(lam_tokens_path=path), both)
    assert policy.config.lam_camera_key == WRIST


def test_a_misspelt_camera_beside_a_store_is_refused(dataset, store):
    config = lam_config(lam_tokens_path=str(store.path), lam_camera_key="observation.images.tpo")
    with refused(f"observation.images.tpo, the store has {TOP}: leave that flag out"):
        build(config, dataset)


def test_the_camera_is_not_guessed(both, make_store, caplog):
    """The store saw the top camera, the policy only sees the wrist: that is not the same camera."""
    store = make_store(both, camera_key=TOP)

    def trained(camera, rename_map):
        features = {
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            camera: PolicyFeature(FeatureType.VISUAL, (3, 48, 48)),
        }
        config = lam_config(lam_tokens_path=str(store.path), input_features=features)
        make_policy(config, ds_meta=both.meta, rename_map=rename_map)
        return config.lam_camera_key

    assert trained("observation.images.front", {WRIST: "observation.images.front"}) is None
    assert "not known which of the policy's cameras" in caplog.text
    caplog.clear()
    assert trained(WRIST, None) == TOP  # which is no input of the policy; nothing is renamed
    assert "Training goes on" not in caplog.text


# What is missing is told early: episodes, and the LAM that a deployment needs.


def test_partial_store_warns_and_the_batch_names_episode_and_frame(dataset, make_store, caplog):
    some = LeRobotDataset("local/squares", root=dataset.root, episodes=[1, 3], return_uint8=True)
    policy, preprocess = build(lam_config(lam_tokens_path=str(make_store(some).path)), dataset)
    assert "2 of 5 episodes (1, 3)" in caplog.text
    covered = preprocess(training_batch(policy.config, dataset, [14, 41]))
    assert torch.isfinite(policy.forward(covered)[0])
    with refused("lacks episode 2, which frame 30 belongs to", "--dataset.episodes"):
        policy.forward(preprocess(training_batch(policy.config, dataset, [14, 30])))


def test_a_lam_that_is_not_here_is_told_before_training(dataset, store, with_column, caplog):
    build(lam_config(lam_tokens_path=str(store.path)), dataset)
    assert "Training goes on" not in caplog.text
    build(lam_config(lam_tokens_path=str(store.path), lam_model_path="/nowhere/lam"), dataset)
    assert "not at /nowhere/lam. Training goes on" in caplog.text
    caplog.clear()
    build(lam_config(), with_column)
    assert "is not known. Training goes on" in caplog.text
    assert "--policy.lam_model_path" in caplog.text


# Column and store give the same loss, bit for bit.


def losses_of(routes, rows, scale=None):
    losses = []
    for source, fields in routes:
        policy, preprocess = build(lam_config(**fields, lam_temporal_aggregation="concat"), source)
        policy.config.lam_token_scale = scale or policy.config.lam_token_scale
        make_lam_weights_matter(policy)
        batch = preprocess(training_batch(policy.config, source, rows))
        torch.manual_seed(0)
        losses.append(policy.forward(batch)[0].item())
    return losses


@pytest.mark.parametrize("with_stats", [False, True])
def test_column_and_store_give_the_same_loss(dataset, with_column, store, with_stats, monkeypatch):
    """Also where the dataset has statistics for the column, by which LeRobot would normalise it."""
    if with_stats:
        statistics = {"min": -1, "max": 3, "mean": 0.5, "std": 2, "count": 60}
        of_tokens = {name: torch.full((64,), float(value)).numpy() for name, value in statistics.items()}
        monkeypatch.setitem(with_column.meta.stats, OBS_LAM_TOKENS, of_tokens)
    routes = [(dataset, {"lam_tokens_path": str(store.path)}), (with_column, {})]
    by_store, by_column = losses_of(routes, [1, 20, 30], store.provenance.lam.token_scale)
    assert by_store == by_column


@pytest.mark.parametrize("kind", ["store", "continuous_store"])
@pytest.mark.parametrize("recomputed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_added_column_and_its_store_give_the_same_loss(dataset, kind, recomputed, request, tmp_path):
    """Nothing is told to the policy but where the tokens are."""
    store = request.getfixturevalue(kind)
    added = opened(add_column(store, dataset.meta, tmp_path / "data").root)
    if recomputed:
        recompute_stats(added)
        added = opened(added.root)
    assert OBS_LAM_TOKENS in added.meta.stats
    vq = {"lam_use_vq_tokens": kind == "store"}
    routes = [(dataset, {"lam_tokens_path": str(store.path), **vq}), (added, vq)]
    by_store, by_column = losses_of(routes, [0, 1, 20, 30])
    assert by_store == by_column
