"""Tokens of several cameras and LAMs side by side: one policy, whichever way they come."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy

from lerobot_lam_diffusion import DiffusionLamPolicy, LamTokenDataset
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.policy.model_card import lam_section
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.add_column import add_column
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import TOP, record_dataset, write_lam
from tests.policies import (
    build,
    lam_config,
    make_lam_weights_matter,
    observation,
    record_tokens,
    refused,
    training_batch,
)
from tests.test_lerobot_train import SMALL_FLAGS, same, train, weights

WRIST = "observation.images.wrist"
SIDES = {TOP: 48, WRIST: 32}
SMALL_FEATURES = {
    "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
    TOP: PolicyFeature(FeatureType.VISUAL, (3, 48, 48)),
}
"""Diffusion Policy takes pictures of one size: the policy sees the top camera, the LAMs see both."""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """33 frames in 3 episodes, two cameras of different sizes."""
    root = tmp_path_factory.mktemp("both") / "data"
    return record_dataset(root, lengths=(12, 9, 12), cameras=SIDES)


@pytest.fixture(scope="module")
def lams(both, tmp_path_factory):
    """For the top camera a LAM of 2 × 32 numbers, for the wrist's one of 3 × 16."""
    frames = {camera: torch.stack([both[i][camera] for i in range(len(both))]) for camera in SIDES}
    root = tmp_path_factory.mktemp("lams")
    top = write_lam(root / "top", frames[TOP])
    wrist = write_lam(root / "wrist", frames[WRIST], seed=5, num_learned_tokens=3, action_latent_dim=16)
    return [str(top), str(wrist)]


@pytest.fixture(scope="module")
def extract(both, lams, tmp_path_factory):
    """Extracts the tokens of a camera: `extract(WRIST, lams[1], frame_stride=2)`."""

    def extracted(camera: str, lam: str, **options) -> TokenStore:
        folder = tmp_path_factory.mktemp("tokens") / "store"
        options = {"show_progress": False, "batch_size": 8, **options}
        lam_ = load_lam(lam, dtype=options.pop("lam_dtype", torch.float32))
        return precompute_tokens(both, lam_, folder, camera_key=camera, lam_path=lam, **options).store

    return extracted


@pytest.fixture(scope="module")
def stores(extract, lams):
    """VQ tokens, stride 2, of the top and the wrist camera, each by its own LAM."""
    return [extract(camera, lam, frame_stride=2) for camera, lam in zip(SIDES, lams, strict=True)]


def stored(stores, **fields):
    paths = [str(store.path) for store in stores]
    return lam_config(lam_tokens_path=paths, input_features=dict(SMALL_FEATURES), **fields)


def live(lams, **fields):
    on_the_fly = {"use_precomputed_lam_tokens": False, "lam_camera_key": [TOP, WRIST], "lam_model_path": lams}
    others = {"lam_frame_stride": 2, "input_features": dict(SMALL_FEATURES), "num_inference_steps": 1}
    return lam_config(**{**on_the_fly, **others, **fields})


def side_by_side(stores, rows, deltas):
    """What the policy is to be conditioned on: each store's tokens divided by its own scale."""
    index = torch.tensor(rows)
    parts = [store.window(index, deltas) / store.provenance.lam.token_scale for store in stores]
    return torch.cat(parts, dim=-1)


def test_training_fills_in_what_the_checkpoint_must_know(both, stores, lams, tmp_path, caplog):
    policy, _ = build(stored(stores), both)
    policy.save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert config.lam_camera_key == [TOP, WRIST]
    assert config.lam_model_path == lams
    assert config.lam_fingerprint == [store.provenance.lam.fingerprint for store in stores]
    assert config.lam_token_scale == [store.provenance.lam.token_scale for store in stores]
    assert (config.lam_num_learned_tokens, config.lam_action_latent_dim) == ([2, 3], [32, 16])
    assert config.lam_source == [f"store:{store.path}" for store in stores]
    assert config.lam_frame_stride == 2
    assert config.lam_token_dim == 2 * 32 + 3 * 16
    assert policy.diffusion.lam_model is None
    assert "Training goes on" not in caplog.text

    card = lam_section(config, both.fps)
    for row in (
        "| | source 1 | source 2 |\n| --- | --- | --- |",
        f"| camera | `{TOP}` | `{WRIST}` |",
        "| LAM | `top` (a folder where it was trained) | `wrist` (a folder where it was trained) |",
        "| tokens | VQ, 2 × 32, float32 | VQ, 3 × 16, float32 |",
        "| trained on | store `store` (a folder where it was trained) |",
    ):
        assert row in card, card


@pytest.mark.parametrize("use_vq_tokens", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_batch_two_ways_one_loss(both, stores, extract, lams, use_vq_tokens):
    if not use_vq_tokens:
        stores = [
            extract(camera, lam, frame_stride=2, use_vq_tokens=False)
            for camera, lam in zip(SIDES, lams, strict=True)
        ]
    shared = {"lam_temporal_aggregation": "concat", "n_obs_steps": 3, "lam_conditioning_steps": 2}
    shared["lam_use_vq_tokens"] = use_vq_tokens
    rows = [0, 1, 2, 3, 9, 14, 25, 32]
    losses, tokens = [], []
    for config in (stored(stores, **shared), live(lams, **shared)):
        policy, preprocess = build(config, both)
        seen = record_tokens(policy)
        make_lam_weights_matter(policy)
        torch.manual_seed(0)
        losses.append(policy.forward(preprocess(training_batch(config, both, rows)))[0].item())
        tokens.append(seen[-1])  # the pass before it, for the figures, sees them shuffled
    expected = side_by_side(stores, rows, [-1, 0])
    assert expected.shape == (8, 2, 64 + 48)
    assert torch.equal(tokens[0], expected)
    if use_vq_tokens:
        assert torch.equal(tokens[1], expected)
        assert losses[0] == losses[1]
        for part in expected.split([64, 48], dim=-1):
            assert len(part.flatten(0, 1).unique(dim=0)) >= 4
    else:
        torch.testing.assert_close(tokens[1], expected, atol=2e-4, rtol=0)


def test_a_policy_trained_on_two_stores_computes_both_live(both, stores, lams, tmp_path, monkeypatch):
    policy, preprocess = build(stored(stores, n_action_steps=1, num_inference_steps=1), both)
    policy.save_pretrained(tmp_path)
    policy = DiffusionLamPolicy.from_pretrained(tmp_path)
    seen = record_tokens(policy)
    rows = range(12, 21)
    for row in rows:
        policy.select_action(preprocess(observation(both, [row], SIDES)))
    for row, tokens in zip(rows, seen, strict=True):
        assert torch.equal(tokens, side_by_side(stores, [row], [0])), row
    assert [lam.fingerprint for lam in policy.diffusion.lam_model] == policy.config.lam_fingerprint
    policy.reset()
    with pytest.raises(UserError, match=r"camera 'observation.images.wrist' is not among the cameras"):
        policy.select_action(preprocess(observation(both, [0])))


@pytest.mark.parametrize("position", [0, 1])
def test_another_lam_in_any_position_is_refused(both, stores, lams, frames, tmp_path, position, caplog):
    fields = ({}, {"num_learned_tokens": 3, "action_latent_dim": 16})[position]
    others = list(lams)
    others[position] = str(write_lam(tmp_path / "other", frames, seed=9, **fields))
    build(stored(stores), both)[0].save_pretrained(tmp_path / "policy")
    config = PreTrainedConfig.from_pretrained(
        tmp_path / "policy", cli_overrides=[f"--lam_model_path=[{','.join(others)}]"]
    )
    policy = DiffusionLamPolicy.from_pretrained(tmp_path / "policy", config=config)
    camera = list(SIDES)[position]
    with pytest.raises(
        UserError, match=rf"the LAMs do not fit .*other for {camera}: the LAM's fingerprint is"
    ):
        _ = policy.live_tokens.lams
    policy.config.lam_allow_mismatch = True
    assert len(policy.live_tokens.lams) == 2
    assert caplog.text.count("ANOTHER LAM THAN TRAINED WITH") == 1


def test_a_lam_that_two_cameras_share_is_loaded_once(both, lams, tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(
        "lerobot_lam_diffusion.lam.load_lam", lambda path, **_: loads.append(path) or load_lam(path)
    )
    (tmp_path / "link").symlink_to(lams[0])
    for path in (lams[0], [lams[0], str(tmp_path / "link")]):
        config = live(path)
        policy, _ = build(config, both)
        assert policy.diffusion.lam_model[0] is policy.diffusion.lam_model[1]
        assert config.lam_model_path == path
        assert config.lam_fingerprint == [policy.diffusion.lam_model[0].fingerprint] * 2
        assert config.lam_token_dim == 128
    assert config.lam_source == [f"live:{lams[0]}", f"live:{tmp_path / 'link'}"]
    assert len(loads) == 2

    shutil.copytree(lams[0], tmp_path / "copy")
    config = live([lams[0], str(tmp_path / "copy")], lam_camera_key=TOP)
    with pytest.raises(UserError, match=r"sources 1 and 2 are the same: .*images.top.*the same LAM"):
        build(config, both)
    with pytest.raises(UserError, match=r"lam_camera_key=observation.images.wirst is not among .*wrist'\]"):
        build(live(lams, lam_camera_key=[TOP, "observation.images.wirst"]), both)


def test_one_camera_seen_by_two_lams(both, lams):
    config = live(lams, lam_camera_key=TOP)
    policy, preprocess = build(config, both)
    assert torch.isfinite(policy.forward(preprocess(training_batch(config, both, [5, 20])))[0])
    policy.eval()
    assert policy.select_action(preprocess(observation(both, [3], SIDES))).shape == (1, 2)
    assert config.lam_token_dim == 112


def test_stores_that_differ_are_refused_with_all_problems_at_once(both, stores, extract, lams, tmp_path):
    continuous = extract(WRIST, lams[1], use_vq_tokens=False, lam_dtype=torch.bfloat16)
    copy = str(shutil.copytree(stores[0].path, tmp_path / "copy"))
    (tmp_path / "link").symlink_to(stores[0].path)
    paths = [str(stores[0].path), str(continuous.path), copy, str(tmp_path / "link")]
    with refused(
        "the token stores do not fit the policy",
        f"{stores[0].path} and {copy} hold the same tokens: both are of camera {TOP}",
        "link is named twice",
        f"different frame strides (--frame_stride): {stores[0].path} has 2, {continuous.path} has 1",
        f"different kinds of tokens (--use_vq_tokens): {stores[0].path} has vq, {continuous.path} has contin",
        f"different compute dtypes (--dtype): {stores[0].path} has float32, {continuous.path} has bfloat16",
        f"{continuous.path}: it holds continuous tokens: pass --policy.lam_use_vq_tokens=false",
    ):
        build(lam_config(lam_tokens_path=paths, input_features=dict(SMALL_FEATURES)), both)
    with pytest.raises(UserError, match="these token stores cannot be joined: they have different frame"):
        LamTokenDataset(both, [stores[0], extract(WRIST, lams[1])])


def test_fields_are_checked_store_by_store(both, stores, tmp_path):
    swapped = {"lam_camera_key": [WRIST, TOP], "lam_num_learned_tokens": [2, 4]}
    with refused(
        f"{stores[0].path}: --policy.lam_camera_key is {WRIST}, the store has {TOP}",
        f"{stores[1].path}: --policy.lam_camera_key is {TOP}, the store has {WRIST}",
        f"{stores[1].path}: --policy.lam_num_learned_tokens is 4, the store has 3",
        "3 problems",
    ):
        build(stored(stores, **swapped), both)
    nowhere = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(UserError, match=r"no token store at .*/a: "):
        build(lam_config(lam_tokens_path=nowhere, input_features=dict(SMALL_FEATURES)), both)


def test_a_column_holds_the_tokens_of_one_source(both, stores, tmp_path):
    root = add_column(stores[0], both.meta, tmp_path / "data").root
    meta = LeRobotDataset("local/column", root=root, video_backend="pyav").meta
    fields = {"input_features": dict(SMALL_FEATURES), "lam_camera_key": [TOP, WRIST]}
    with pytest.raises(UserError, match=r"holds the tokens of one camera and LAM, the policy has 2 sources"):
        make_policy(lam_config(**fields), ds_meta=meta)
    with pytest.raises(UserError, match=r"two sources of LAM tokens: --policy.lam_tokens_path=\[.*,.*\]"):
        make_policy(stored(stores), ds_meta=meta)


def test_a_dataset_joins_the_tokens_of_several_stores(both, stores):
    joined = LamTokenDataset(both, [store.path for store in stores], deltas=[-1, 0])
    parts = [LamTokenDataset(both, store, deltas=[-1, 0]) for store in stores]
    for row in (0, 5, 32):
        tokens = [part[row]["observation.lam_tokens"] for part in parts]
        assert torch.equal(joined[row]["observation.lam_tokens"], torch.cat(tokens, dim=-1))
    assert joined.store.token_dim == 112
    assert isinstance(LamTokenDataset(both, [stores[0].path]).store, TokenStore)
    with pytest.raises(UserError, match="no token store is named"):
        LamTokenDataset(both, [])


def test_auto_builds_a_store_for_each_source(both, lams, builds, tmp_path):
    fields = {"use_precomputed_lam_tokens": True, "lam_tokens_path": "auto"}
    shutil.copytree(lams[0], tmp_path / "copy")
    twice = live([lams[0], str(tmp_path / "copy")], **fields, lam_camera_key=TOP)
    with pytest.raises(UserError, match="sources 1 and 2 are the same"):
        build(twice, both)
    with pytest.raises(
        UserError, match=r"wrist for .*wrist: --policy.lam_num_learned_tokens is 2, the LAM has 3"
    ):
        build(live(lams, **fields, lam_num_learned_tokens=2), both)
    assert not builds
    for _ in range(2):
        config = live(lams, **fields)
        policy, preprocess = build(config, both)
        assert len(builds) == 2
        assert config.lam_source == [f"store:{folder}" for folder in builds]
        assert config.lam_tokens_path == "auto"
        assert config.lam_model_path == lams
    seen = record_tokens(policy)
    policy.forward(preprocess(training_batch(config, both, [5, 30])))
    assert torch.equal(seen[-1], side_by_side([TokenStore.open(folder) for folder in builds], [5, 30], [0]))


@pytest.mark.slow
def test_lerobot_train_on_two_stores_on_the_fly_and_resumed(monkeypatch, both, stores, lams, tmp_path):
    picture = "{type: VISUAL, shape: [3, 48, 48]}"
    inputs = f"{{observation.state: {{type: STATE, shape: [2]}}, {TOP}: {picture}}}"
    flags = [*SMALL_FLAGS, f"--dataset.root={both.root}", f"--policy.input_features={inputs}"]
    by_store = [f"--policy.lam_tokens_path=[{stores[0].path},{stores[1].path}]"]
    on_the_fly = ["--policy.use_precomputed_lam_tokens=false", f"--policy.lam_camera_key=[{TOP},{WRIST}]"]
    on_the_fly += [f"--policy.lam_model_path=[{','.join(lams)}]", "--policy.lam_frame_stride=2"]
    for name, source in (("stored", by_store), ("live", on_the_fly)):
        train(monkeypatch, *flags, *source, f"--output_dir={tmp_path / name}", "--steps=2")
    assert same(weights(tmp_path / "stored"), weights(tmp_path / "live"))
    checkpoint = tmp_path / "stored" / "checkpoints" / "000002" / "pretrained_model"
    saved = json.loads(Path(checkpoint / "config.json").read_text())
    assert saved["lam_source"] == [f"store:{store.path}" for store in stores]
    train(monkeypatch, f"--config_path={checkpoint / 'train_config.json'}", "--resume=true", "--steps=3")
    assert not same(weights(tmp_path / "stored"), weights(tmp_path / "live"))
