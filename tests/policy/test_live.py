"""The invariant on the way to the robot: tokens computed from frames are those of the store."""

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.rollout.inference.sync import SyncInferenceEngine

from lerobot_lam_diffusion import OBS_LAM_TOKENS, DiffusionLamPolicy
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from tests.conftest import FPS, TOP, write_lam
from tests.policies import (
    build,
    lam_config,
    live_config,
    make_lam_weights_matter,
    observation,
    refused,
    teach,
    training_batch,
)

CONTINUOUS_TOLERANCE = 1e-4  # the tests' LAM magnifies its encoder's rounding (about 1e-6) some 30 times


class ConditioningTokens:
    """Records the tokens that condition each predicted chunk, inside `generate_actions`."""

    def __init__(self, policy):
        self.seen = []
        self._scale = policy.config.lam_token_scale
        policy.diffusion.lam_projection.register_forward_pre_hook(self._record)

    def _record(self, module, inputs):
        self.seen.append(inputs[0] * self._scale)

    def assert_last(self, expected, exact=True, rows=slice(None)):
        """Tokens pass through one division by the scale; compare on that side of it, bit for bit."""
        if exact:
            assert torch.equal(self.seen[-1][rows], expected[rows] / self._scale * self._scale)
        else:
            torch.testing.assert_close(self.seen[-1], expected, atol=CONTINUOUS_TOLERANCE, rtol=0)


def deploy(dataset, store, **fields):
    """A policy built on precomputed tokens, ready to act without them, and what it will be conditioned on."""
    fields = {"lam_tokens_path": str(store.path), "num_inference_steps": 1, **fields}
    policy, preprocess = build(lam_config(**fields), dataset)
    policy.eval()
    return policy, preprocess, ConditioningTokens(policy)


def loaded(folder, *overrides):
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=list(overrides))
    return DiffusionLamPolicy.from_pretrained(folder, config=config)


def episode(dataset, number):
    bounds = dataset.meta.episodes[number]
    return range(bounds["dataset_from_index"], bounds["dataset_to_index"])


def act(policy, preprocess, recorded, dataset, store, rows):
    """Act through an episode; each chunk is conditioned on the store's tokens, which are returned."""
    compared = []
    for tick, row in enumerate(rows):
        chunks = len(recorded.seen)
        policy.select_action(preprocess(observation(dataset, [row])))
        predicts = tick % policy.config.n_action_steps == 0
        assert len(recorded.seen) - chunks == predicts
        if len(recorded.seen) > chunks:
            compared.append(store.window(torch.tensor([row]), policy.config.lam_token_deltas))
            recorded.assert_last(compared[-1], exact=policy.config.lam_use_vq_tokens)
    return compared


# A policy trained on precomputed tokens, deployed without them: tick by tick the store's tokens.


@pytest.mark.parametrize(
    ("aggregation", "stride", "n_obs_steps", "vq", "n_action_steps"),
    [
        ("latest", 1, 1, True, 4),
        ("latest", 3, 2, True, 1),
        ("concat", 1, 2, True, 4),
        ("concat", 3, 3, True, 1),
        ("concat", 1, 3, False, 4),
    ],
)
def test_frames_of_an_episode_give_the_stores_tokens(
    dataset, make_store, aggregation, stride, n_obs_steps, vq, n_action_steps
):
    store = make_store(dataset, frame_stride=stride, use_vq_tokens=vq)
    fields = {"lam_temporal_aggregation": aggregation, "lam_use_vq_tokens": vq}
    policy, *rest = deploy(dataset, store, **fields, n_obs_steps=n_obs_steps, n_action_steps=n_action_steps)
    compared = []
    for number in (0, 2):
        policy.reset()
        compared += act(policy, *rest, dataset, store, episode(dataset, number))
    distinct = torch.cat(compared).flatten(0, 1).unique(dim=0)
    assert len(distinct) >= 4  # the zero token among them
    assert policy.diffusion.lam_model is not None


def test_environments_of_different_lengths(dataset, store):
    policy, preprocess, recorded = deploy(dataset, store, n_action_steps=1)
    long, short = episode(dataset, 2), episode(dataset, 3)
    for tick, row in enumerate(long):
        other = short[min(tick, len(short) - 1)]
        policy.select_action(preprocess(observation(dataset, [row, other])))
        running = slice(0, 2 if tick < len(short) else 1)
        recorded.assert_last(store.window(torch.tensor([row, other]), [0]), rows=running)


def test_a_reset_in_mid_episode_forgets_the_frames_before_it(dataset, store):
    policy, preprocess, recorded = deploy(dataset, store, n_action_steps=1)
    for row in (25, 26, 27):
        policy.select_action(preprocess(observation(dataset, [row])))
    assert recorded.seen[-1].any()
    policy.reset()
    policy.select_action(preprocess(observation(dataset, [28])))
    assert not recorded.seen[-1].any()
    policy.select_action(preprocess(observation(dataset, [29])))
    recorded.assert_last(store.window(torch.tensor([29]), [0]))


def test_rename_map_renames_the_lams_camera_too(dataset, store):
    """The LAM's camera goes by the policy's name for it."""
    policy, preprocess, recorded = deploy(dataset, store)
    preprocess.steps[0].rename_map = {"observation.images.robot_top": TOP}
    for row in (20, 21, 22, 23, 24):
        seen = observation(dataset, [row])
        seen["observation.images.robot_top"] = seen.pop(TOP)
        policy.select_action(preprocess(seen))
    recorded.assert_last(store.window(torch.tensor([24]), [0]))


def test_rollouts_sync_engine_computes_the_same_tokens(dataset, store):
    """`lerobot-rollout` hands over what a robot gives: arrays, images (H, W, 3) uint8."""
    policy, _, recorded = deploy(dataset, store, n_action_steps=2)
    processors = make_pre_post_processors(policy.config, dataset_stats=dataset.meta.stats)
    engine = SyncInferenceEngine(policy, *processors, dataset.meta.features, ["x", "y"], "wander", "cpu", "")
    engine.reset()
    expected = []
    for tick, row in enumerate(episode(dataset, 2)):
        item = dataset[row]
        image = item[TOP].permute(1, 2, 0).numpy()
        action = engine.get_action({"observation.state": item["observation.state"].numpy(), TOP: image})
        assert action.shape == (2,)
        if tick % 2 == 0:
            expected.append(store.window(torch.tensor([row]), [0]))
            assert len(recorded.seen) == len(expected)
            recorded.assert_last(expected[-1])
    assert len(torch.cat(expected).unique(dim=0)) >= 4


# Training on the fly: the same tokens and losses, and no trace of the LAM.


@pytest.mark.parametrize(
    ("aggregation", "n_obs_steps", "steps", "stride"),
    [("latest", 2, 1, 1), ("latest", 2, 1, 3), ("concat", 3, 2, 1), ("concat", 3, 2, 3)],
)
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_batch_two_sources_one_loss(
    dataset, make_store, lam_folder, aggregation, n_obs_steps, steps, stride, autocast
):
    store = make_store(dataset, frame_stride=stride)
    shared = {
        "lam_temporal_aggregation": aggregation,
        "n_obs_steps": n_obs_steps,
        "lam_conditioning_steps": steps,
        "lam_frame_stride": stride,
    }
    rows = [0, 1, 2, 15, 20, 21, 30, 59]
    losses, tokens = [], []
    for config in (lam_config(lam_tokens_path=str(store.path), **shared), live_config(lam_folder, **shared)):
        policy, preprocess = build(config, dataset)
        recorded = ConditioningTokens(policy)
        make_lam_weights_matter(policy)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(policy.forward(preprocess(training_batch(config, dataset, rows)))[0].item())
        tokens.append(recorded.seen[-1])  # the pass before it measures with shuffled tokens
    assert torch.equal(*tokens)
    assert len(tokens[0].flatten(0, 1).unique(dim=0)) >= 4
    assert losses[0] == losses[1]


def test_the_lam_is_no_part_of_the_policy(dataset, lam_folder, tmp_path):
    live, _ = build(live_config(lam_folder), dataset)
    off, _ = build(lam_config(use_lam_conditioning=False), dataset)
    assert live.diffusion.lam_model is not None
    own = sum(p.numel() for name, p in live.named_parameters() if name in live._lam_parameters())
    assert sum(p.numel() for p in live.parameters()) == sum(p.numel() for p in off.parameters()) + own
    live.save_pretrained(tmp_path)
    again = DiffusionLamPolicy.from_pretrained(tmp_path)
    assert again.config.lam_fingerprint == live.diffusion.lam_model.fingerprint
    assert again.config.lam_source == f"live:{lam_folder}"
    assert again.config.lam_fps == FPS


def test_switching_the_source_keeps_every_shape(dataset, store, tmp_path):
    policy, preprocess, _ = deploy(dataset, store, lam_temporal_aggregation="concat", n_obs_steps=3)
    policy.save_pretrained(tmp_path)
    live = loaded(tmp_path, "--use_precomputed_lam_tokens=false")
    batch = preprocess(training_batch(live.config, dataset, [1, 20]))
    assert torch.isfinite(live.forward(batch)[0])


def test_fine_tuning_on_another_lam_records_that_lam(dataset, lam_folder, frames, tmp_path):
    other = write_lam(tmp_path / "other", frames, seed=9)
    build(live_config(lam_folder), dataset)[0].save_pretrained(tmp_path / "first")
    overrides = [f"--lam_model_path={other}", "--lam_allow_mismatch=true"]
    config = PreTrainedConfig.from_pretrained(tmp_path / "first", cli_overrides=overrides)
    config.pretrained_path = tmp_path / "first"
    tuned = make_policy(config, ds_meta=dataset.meta)
    assert tuned.config.lam_fingerprint == load_lam(other).fingerprint
    assert tuned.config.lam_allow_mismatch is False


# The token decides the action; a batch's own tokens win; a policy trained with dropout may do without.


@pytest.mark.slow
def test_a_trained_policys_action_depends_on_the_live_motion(dataset, frames, lam, store, tmp_path):
    """Same last image and state, another frame before it: another action, as it was taught."""
    now = 30
    tokens = lam.encode_pairs(frames, frames[now].expand_as(frames)).quantized
    before = (29, int((tokens - tokens[29]).norm(dim=1).argmax()))  # two pasts whose tokens differ most
    config = lam_config(lam_tokens_path=str(store.path), n_obs_steps=1, prediction_type="sample")
    policy, preprocess = build(config, dataset)
    batch = preprocess(training_batch(config, dataset, [now] * 4))
    batch["action"] = torch.tensor([0.7, -0.7, 0.7, -0.7]).view(4, 1, 1).expand(4, 8, 2)
    batch[OBS_LAM_TOKENS] = tokens[[*before, *before]].unsqueeze(1)
    teach(policy, batch)
    policy.save_pretrained(tmp_path)
    policy = DiffusionLamPolicy.from_pretrained(tmp_path)

    actions = []
    for row in before:
        policy.reset()
        policy.select_action(preprocess(observation(dataset, [row])))
        policy._queues["action"].clear()  # the next tick predicts anew
        torch.manual_seed(0)
        actions.append(policy.select_action(preprocess(observation(dataset, [now]))))
    assert actions[0].mean() > 0.3
    assert actions[1].mean() < -0.3


def test_after_a_bfloat16_store_the_live_lam_runs_in_bfloat16_too(dataset, lam_folder, tmp_path):
    lam = load_lam(lam_folder, dtype=torch.bfloat16)
    made = {"camera_key": TOP, "lam_path": str(lam_folder), "show_progress": False, "use_vq_tokens": False}
    store = precompute_tokens(dataset, lam, tmp_path / "store", **made).store
    policy, *rest = deploy(dataset, store, lam_use_vq_tokens=False)
    act(policy, *rest, dataset, store, episode(dataset, 0)[:4])
    assert policy.live_tokens.lams[0].model.dtype == torch.bfloat16


def test_tokens_in_the_batch_win_over_the_lam(dataset, store):
    policy, preprocess, recorded = deploy(dataset, store)
    now, own = preprocess(observation(dataset, [20])), torch.full((1, 64), 0.25)
    for shape in ((1, 32), (1, 2, 64), (64,)):
        with refused("expected (B, 64)"):
            policy.select_action(now | {OBS_LAM_TOKENS: torch.zeros(shape)})
    policy.select_action(now | {OBS_LAM_TOKENS: own})
    recorded.assert_last(own.unsqueeze(1))
    assert policy.diffusion.lam_model is None  # nothing was loaded


def test_dropout_drops_windows_and_tokens_and_only_in_training(dataset, store):
    window = {"lam_temporal_aggregation": "concat", "n_obs_steps": 3}
    policy, preprocess, recorded = deploy(dataset, store, lam_token_dropout=0.5, **window)
    rows = [4, 5, 6, 17, 18, 19, 26, 27, 28, 29, 30, 31, 44, 45, 52, 53]
    batch = preprocess(training_batch(policy.config, dataset, rows))
    policy.forward(dict(batch))
    assert recorded.seen[-1].any(-1).all()
    policy.train()
    torch.manual_seed(0)
    policy.forward(dict(batch))
    kept = recorded.seen[-1].any(-1)  # (B, T)
    assert (~kept).all(1).any()  # whole windows
    assert (kept.any(1) & ~kept.all(1)).any()  # and single tokens


def test_a_policy_trained_with_dropout_runs_without_a_lam_when_told(dataset, store, frames, tmp_path):
    fields = {"lam_token_dropout": 0.5, "lam_missing": "zero"}
    policy, preprocess, recorded = deploy(dataset, store, lam_model_path="/nowhere", **fields)
    for row in (20, 21):
        policy.select_action(preprocess(observation(dataset, [row])))
    assert not recorded.seen[-1].any()
    # Which does not excuse a wrong LAM.
    other = write_lam(tmp_path / "other", frames, seed=9)
    policy, preprocess, _ = deploy(dataset, store, **fields)
    policy.config.lam_model_path = str(other)
    with refused("the LAM's fingerprint is"):
        policy.select_action(preprocess(observation(dataset, [20])))


def test_a_policy_trained_on_the_fly_runs_without_its_lam(dataset, lam_folder, tmp_path, caplog):
    """With the batch's own tokens, or with none if told so; the LAM is only missed where it is needed."""
    policy, preprocess = build(live_config(lam_folder, lam_token_dropout=0.5), dataset)
    policy.save_pretrained(tmp_path)
    policy = loaded(tmp_path, "--lam_model_path=/nowhere")
    now = preprocess(observation(dataset, [20]))
    policy.select_action(now | {OBS_LAM_TOKENS: torch.zeros(1, 64)})
    policy.reset()
    with refused("/nowhere"):
        policy.select_action(dict(now))
    policy = loaded(tmp_path, "--lam_model_path=/nowhere", "--lam_missing=zero")
    policy.select_action(dict(now))
    assert "Acting without LAM tokens, as lam_missing=zero says" in caplog.text


# What cannot be computed is refused.


def test_another_lam_is_refused(dataset, store, frames, tmp_path, caplog):
    other = str(write_lam(tmp_path / "other", frames, seed=9))
    policy, preprocess, _ = deploy(dataset, store)
    policy.config.lam_model_path = other  # as the flag of a deployment sets it
    with refused("the LAM's fingerprint is ", "trained with", "lam_allow_mismatch=true"):
        policy.select_action(preprocess(observation(dataset, [20])))
    policy, preprocess, _ = deploy(dataset, store, lam_model_path=other, lam_allow_mismatch=True)
    policy.select_action(preprocess(observation(dataset, [20])))
    assert "ANOTHER LAM THAN TRAINED WITH" in caplog.text
    wide = write_lam(tmp_path / "wide", frames, num_learned_tokens=3)
    with refused("lam_num_learned_tokens is 2, the LAM has 3"):
        build(live_config(wide, lam_num_learned_tokens=2), dataset)


def test_neither_tokens_nor_lam_names_the_flags(dataset, store, tmp_path):
    nowhere = str(tmp_path / "gone")
    policy, preprocess, _ = deploy(dataset, store, lam_model_path=nowhere)
    with refused("--policy.lam_model_path", nowhere):
        policy.select_action(preprocess(observation(dataset, [20])))
    policy.config.lam_model_path = None
    policy.reset()
    with refused("observation.lam_tokens", "--policy.lam_model_path", "--policy.lam_camera"):
        policy.select_action(preprocess(observation(dataset, [20])))


def test_datasets_and_batches_that_do_not_fit_are_refused(dataset, lam_folder):
    with refused("lam_camera_key=observation.front is not among ", TOP):
        build(live_config(lam_folder, lam_camera_key="observation.front"), dataset)
    meta = LeRobotDataset("local/squares", root=dataset.root, video_backend="pyav").meta
    meta.info.features[OBS_LAM_TOKENS] = {"dtype": "float32", "shape": (64,), "names": None}
    with refused("has tokens of its own"):
        make_policy(live_config(lam_folder), ds_meta=meta)
    policy, preprocess = build(live_config(lam_folder), dataset)
    batch = preprocess(training_batch(policy.config, dataset, [0, 20]))
    with refused("which frames are padding"):
        policy.forward({key: value for key, value in batch.items() if not key.endswith("_is_pad")})
