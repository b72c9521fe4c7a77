"""The invariant on the way to the robot: tokens computed from frames are those of the store."""

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion import OBS_LAM_IMAGES, OBS_LAM_TOKENS, DiffusionLamPolicy
from lerobot_lam_diffusion.demo.record import IMAGE_KEY
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from tests.conftest import FPS, TOP, write_lam
from tests.policies import build, lam_config, teach, training_batch

CONTINUOUS_TOLERANCE = 1e-4  # the tests' LAM magnifies its encoder's rounding (about 1e-6) some 30 times


def live_config(lam_folder, **fields):
    on_the_fly = {
        "use_precomputed_lam_tokens": False,
        "lam_camera_key": TOP,
        "lam_model_path": str(lam_folder),
    }
    return lam_config(**{**on_the_fly, "num_inference_steps": 1, **fields})


def observation(dataset, rows, camera=TOP):
    """What a robot, or as many environments as `rows`, sees at one tick; images as LeRobot hands them on."""
    items = [dataset[row] for row in rows]
    return {
        "observation.state": torch.stack([item["observation.state"] for item in items]),
        camera: torch.stack([item[camera] for item in items]).float() / 255,
    }


class ConditioningTokens:
    """Records the tokens that condition each predicted chunk, inside `generate_actions`."""

    def __init__(self, policy):
        self.seen = []
        self._scale = policy.config.lam_token_scale
        policy.diffusion.lam_projection.register_forward_pre_hook(self._record)

    def _record(self, module, inputs):
        self.seen.append(inputs[0] * self._scale)

    def last(self):
        return self.seen[-1]


def deploy(dataset, store, **fields):
    """A policy built on precomputed tokens, ready to act without them, and what it will be conditioned on."""
    policy, preprocess = build(
        lam_config(lam_tokens_path=str(store.path), num_inference_steps=1, **fields), dataset
    )
    policy.eval()
    return policy, preprocess, ConditioningTokens(policy)


def episode(dataset, number):
    bounds = dataset.meta.episodes[number]
    return range(bounds["dataset_from_index"], bounds["dataset_to_index"])


def assert_same_tokens(got, expected, scale, exact):
    """Tokens pass through one division by the scale; compare on that side of it, bit for bit."""
    if exact:
        assert torch.equal(got, expected / scale * scale)
    else:
        torch.testing.assert_close(got, expected, atol=CONTINUOUS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("n_action_steps", [1, 4])
@pytest.mark.parametrize(
    ("aggregation", "stride", "n_obs_steps", "use_vq_tokens"),
    [
        ("latest", 1, 1, True),
        ("latest", 3, 2, True),
        ("concat", 1, 2, True),
        ("concat", 3, 3, True),
        ("concat", 1, 3, False),
    ],
)
def test_frames_of_an_episode_give_the_stores_tokens(
    dataset, make_store, aggregation, stride, n_obs_steps, use_vq_tokens, n_action_steps
):
    """A policy trained on precomputed tokens, deployed without them: tick by tick, each episode."""
    store = make_store(dataset, frame_stride=stride, use_vq_tokens=use_vq_tokens)
    policy, preprocess, recorded = deploy(
        dataset,
        store,
        lam_temporal_aggregation=aggregation,
        lam_use_vq_tokens=use_vq_tokens,
        n_obs_steps=n_obs_steps,
        n_action_steps=n_action_steps,
    )
    config = policy.config
    compared = []
    for number in (0, 2):
        policy.reset()
        for tick, row in enumerate(episode(dataset, number)):
            chunks = len(recorded.seen)
            policy.select_action(preprocess(observation(dataset, [row])))
            assert len(recorded.seen) - chunks == (tick % n_action_steps == 0)
            if len(recorded.seen) > chunks:
                expected = store.window(torch.tensor([row]), config.lam_token_deltas)
                assert_same_tokens(recorded.last(), expected, config.lam_token_scale, use_vq_tokens)
                compared.append(expected)
    distinct = torch.cat(compared).flatten(0, 1).unique(dim=0)
    assert len(distinct) >= 4  # the zero token among them
    assert policy.diffusion.lam_model is not None


@pytest.mark.slow
@pytest.mark.parametrize("n_action_steps", [1, 4])
@pytest.mark.parametrize(
    ("aggregation", "stride", "n_obs_steps", "use_vq_tokens"),
    [("latest", 1, 1, True), ("concat", 3, 3, True), ("concat", 1, 2, False)],
)
def test_the_shipped_lam_on_pusht(
    pusht, tmp_path, aggregation, stride, n_obs_steps, use_vq_tokens, n_action_steps
):
    store = precompute_tokens(
        pusht,
        load_lam("pusht-compact"),
        tmp_path / "store",
        camera_key=IMAGE_KEY,
        lam_path="pusht-compact",
        frame_stride=stride,
        use_vq_tokens=use_vq_tokens,
        show_progress=False,
    ).store
    policy, preprocess, recorded = deploy(
        pusht,
        store,
        lam_temporal_aggregation=aggregation,
        lam_use_vq_tokens=use_vq_tokens,
        n_obs_steps=n_obs_steps,
        n_action_steps=n_action_steps,
    )
    config = policy.config
    rows = episode(pusht, 1)[:24]
    for row in rows:
        policy.select_action(preprocess(observation(pusht, [row], IMAGE_KEY)))
    expected = [store.window(torch.tensor([row]), config.lam_token_deltas) for row in rows[::n_action_steps]]
    assert len(recorded.seen) == len(expected)
    for got, want in zip(recorded.seen, expected, strict=True):
        assert_same_tokens(got, want, config.lam_token_scale, use_vq_tokens)
    assert len(torch.cat(expected).flatten(0, 1).unique(dim=0)) >= 4
    if use_vq_tokens:
        assert len(store.values.unique()) >= 16


def test_environments_of_different_lengths(dataset, store):
    policy, preprocess, recorded = deploy(dataset, store, n_action_steps=1)
    config = policy.config
    long, short = episode(dataset, 2), episode(dataset, 3)
    for tick, row in enumerate(long):
        other = short[min(tick, len(short) - 1)]
        policy.select_action(preprocess(observation(dataset, [row, other])))
        expected = store.window(torch.tensor([row, other]), [0])
        running = slice(0, 2 if tick < len(short) else 1)
        assert_same_tokens(recorded.last()[running], expected[running], config.lam_token_scale, True)


def test_a_reset_in_mid_episode_forgets_the_frames_before_it(dataset, store):
    policy, preprocess, recorded = deploy(dataset, store, n_action_steps=1)
    config = policy.config
    for row in (25, 26, 27):
        policy.select_action(preprocess(observation(dataset, [row])))
    assert recorded.last().any()
    policy.reset()
    policy.select_action(preprocess(observation(dataset, [28])))
    assert not recorded.last().any()
    policy.select_action(preprocess(observation(dataset, [29])))
    assert_same_tokens(recorded.last(), store.window(torch.tensor([29]), [0]), config.lam_token_scale, True)


@pytest.mark.parametrize(
    ("aggregation", "n_obs_steps", "steps", "stride"),
    [("latest", 2, 1, 1), ("latest", 2, 1, 3), ("concat", 3, 2, 1), ("concat", 3, 2, 3)],
)
@pytest.mark.parametrize("autocast", [False, True])
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
    for config in (
        lam_config(lam_tokens_path=str(store.path), **shared),
        live_config(lam_folder, **shared),
    ):
        policy, preprocess = build(config, dataset)
        recorded = ConditioningTokens(policy)
        torch.manual_seed(3)
        for name, parameter in policy.named_parameters():
            if name.endswith("cond_encoder.lam.weight"):
                torch.nn.init.normal_(parameter)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(policy.forward(preprocess(training_batch(config, dataset, rows)))[0].item())
        tokens.append(recorded.last())
    assert torch.equal(tokens[0], tokens[1])
    assert len(tokens[0].flatten(0, 1).unique(dim=0)) >= 4
    assert losses[0] == losses[1]


def test_pairs_that_occur_twice_are_encoded_once(dataset, lam_folder, monkeypatch):
    config = live_config(lam_folder, lam_temporal_aggregation="concat", n_obs_steps=3)
    policy, preprocess = build(config, dataset)
    encoded = []
    (live,) = policy.live_tokens.lams
    encode = live.encode
    monkeypatch.setattr(live, "encode", lambda prev, cur: encoded.append(len(prev)) or encode(prev, cur))
    batch = preprocess(training_batch(config, dataset, [20, 21, 22]))
    policy.forward(batch)
    assert encoded == [4]  # pairs at 19, 20, 21, 22; not the six of three windows of two

    augmented = dict(batch)
    augmented[OBS_LAM_IMAGES] = {TOP: batch[OBS_LAM_IMAGES][TOP].clone()}
    augmented[OBS_LAM_IMAGES][TOP][1] *= 0.5  # what augmentation does to one item
    policy.forward(augmented)
    assert encoded[-1] == 6  # its pixels differ, so its pairs are its own


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


def test_switching_the_source_keeps_every_shape(dataset, store, lam_folder, tmp_path):
    config = lam_config(
        lam_tokens_path=str(store.path),
        lam_temporal_aggregation="concat",
        n_obs_steps=3,
        num_inference_steps=1,
    )
    policy, preprocess = build(config, dataset)
    policy.save_pretrained(tmp_path)
    from lerobot.configs.policies import PreTrainedConfig

    switched = PreTrainedConfig.from_pretrained(
        tmp_path, cli_overrides=["--use_precomputed_lam_tokens=false"]
    )
    live = DiffusionLamPolicy.from_pretrained(tmp_path, config=switched)
    batch = preprocess(training_batch(switched, dataset, [1, 20]))
    assert torch.isfinite(live.forward(batch)[0])


def test_tokens_in_the_batch_win_over_the_lam(dataset, store):
    config = lam_config(lam_tokens_path=str(store.path), num_inference_steps=1)
    policy, preprocess = build(config, dataset)
    policy.eval()
    recorded = ConditioningTokens(policy)
    own = torch.full((1, 64), 0.25)
    policy.select_action(preprocess(observation(dataset, [20])) | {OBS_LAM_TOKENS: own})
    assert_same_tokens(recorded.last(), own.unsqueeze(1), config.lam_token_scale, True)
    assert policy.diffusion.lam_model is None  # nothing was loaded


def test_another_lam_is_refused(dataset, store, frames, tmp_path, caplog):
    other = write_lam(tmp_path / "other", frames, seed=9)
    fields = {"lam_tokens_path": str(store.path), "lam_model_path": str(other), "num_inference_steps": 1}
    policy, preprocess = build(lam_config(**fields), dataset)
    with pytest.raises(ValueError, match=r"its fingerprint is .*trained with .*lam_allow_mismatch=true"):
        policy.select_action(preprocess(observation(dataset, [20])))
    policy, preprocess = build(lam_config(**fields, lam_allow_mismatch=True), dataset)
    policy.select_action(preprocess(observation(dataset, [20])))
    assert "ANOTHER LAM THAN TRAINED WITH" in caplog.text


def test_a_lam_of_another_shape_is_refused(dataset, frames, tmp_path):
    other = write_lam(tmp_path / "other", frames, num_learned_tokens=3)
    with pytest.raises(ValueError, match=r"lam_num_learned_tokens is 2, the LAM has 3"):
        build(live_config(other, lam_num_learned_tokens=2), dataset)


def test_neither_tokens_nor_lam_names_the_flags(dataset, store, tmp_path):
    nowhere = str(tmp_path / "gone")
    policy, preprocess = build(
        lam_config(lam_tokens_path=str(store.path), lam_model_path=nowhere, num_inference_steps=1), dataset
    )
    with pytest.raises(ValueError, match=r"--policy\.lam_model_path") as error:
        policy.select_action(preprocess(observation(dataset, [20])))
    assert nowhere in str(error.value)
    policy.config.lam_model_path = None
    policy.reset()
    with pytest.raises(
        ValueError, match=r"observation.lam_tokens.*--policy.lam_model_path.*--policy.lam_camera"
    ):
        policy.select_action(preprocess(observation(dataset, [20])))


def test_unknown_camera_lists_the_cameras(dataset, lam_folder):
    with pytest.raises(
        ValueError, match=r"lam_camera_key=observation.front is not among .*observation.images.top"
    ):
        build(live_config(lam_folder, lam_camera_key="observation.front"), dataset)


def test_rename_map_renames_the_lams_camera_too(dataset, lam_folder, store):
    """The LAM's camera goes by the policy's name for it."""
    from lerobot.policies.factory import make_pre_post_processors

    policy, _ = build(lam_config(lam_tokens_path=str(store.path), num_inference_steps=1), dataset)
    preprocess, _ = make_pre_post_processors(policy.config, dataset_stats=dataset.meta.stats)
    preprocess.steps[0].rename_map = {"observation.images.robot_top": TOP}
    recorded = ConditioningTokens(policy)
    policy.eval()
    for row in (20, 21, 22, 23, 24):
        seen = observation(dataset, [row])
        seen["observation.images.robot_top"] = seen.pop(TOP)
        policy.select_action(preprocess(seen))
    assert_same_tokens(
        recorded.last(), store.window(torch.tensor([24]), [0]), policy.config.lam_token_scale, True
    )


@pytest.mark.slow
def test_a_trained_policys_action_depends_on_the_live_motion(dataset, frames, lam, store, tmp_path):
    """Same last picture and state, another frame before it: another action, as it was taught."""
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


def test_dropout_drops_windows_and_tokens_and_only_in_training(dataset, store):
    config = lam_config(
        lam_tokens_path=str(store.path),
        lam_token_dropout=0.5,
        lam_temporal_aggregation="concat",
        n_obs_steps=3,
    )
    policy, preprocess = build(config, dataset)
    recorded = ConditioningTokens(policy)
    rows = [4, 5, 6, 17, 18, 19, 26, 27, 28, 29, 30, 31, 44, 45, 52, 53]
    batch = preprocess(training_batch(config, dataset, rows))
    policy.eval()
    policy.forward(dict(batch))
    assert recorded.last().any(-1).all()
    policy.train()
    torch.manual_seed(0)
    policy.forward(dict(batch))
    kept = recorded.last().any(-1)  # (B, T)
    assert (~kept).all(1).any()  # whole windows
    assert (kept.any(1) & ~kept.all(1)).any()  # and single tokens


def test_a_policy_trained_with_dropout_runs_without_a_lam_when_told(dataset, store):
    fields = {"lam_tokens_path": str(store.path), "lam_token_dropout": 0.5, "num_inference_steps": 1}
    policy, preprocess = build(lam_config(**fields, lam_missing="zero", lam_model_path="/nowhere"), dataset)
    policy.eval()
    recorded = ConditioningTokens(policy)
    for row in (20, 21):
        policy.select_action(preprocess(observation(dataset, [row])))
    assert not recorded.last().any()
    policy, preprocess = build(lam_config(**fields, lam_model_path="/nowhere"), dataset)
    with pytest.raises(ValueError, match="lam_model_path"):
        policy.select_action(preprocess(observation(dataset, [20])))


def test_a_policy_trained_on_the_fly_runs_without_its_lam(dataset, lam_folder, tmp_path, caplog):
    """With the batch's own tokens, or with none if told so; the LAM is only missed where it is needed."""
    config = live_config(lam_folder, lam_token_dropout=0.5)
    policy, preprocess = build(config, dataset)
    policy.save_pretrained(tmp_path)
    from lerobot.configs.policies import PreTrainedConfig

    gone = ["--lam_model_path=/nowhere"]
    policy = DiffusionLamPolicy.from_pretrained(
        tmp_path, config=PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=gone)
    )
    now = preprocess(observation(dataset, [20]))
    policy.select_action(now | {OBS_LAM_TOKENS: torch.zeros(1, 64)})
    policy.reset()
    with pytest.raises(ValueError, match="/nowhere"):
        policy.select_action(dict(now))
    policy = DiffusionLamPolicy.from_pretrained(
        tmp_path,
        config=PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=[*gone, "--lam_missing=zero"]),
    )
    policy.select_action(dict(now))
    assert "Acting without LAM tokens, as lam_missing=zero says" in caplog.text


def test_acting_without_a_lam_does_not_excuse_a_wrong_one(dataset, store, frames, tmp_path):
    other = write_lam(tmp_path / "other", frames, seed=9)
    fields = {"lam_tokens_path": str(store.path), "lam_token_dropout": 0.5, "lam_missing": "zero"}
    policy, preprocess = build(lam_config(**fields, lam_model_path=str(other)), dataset)
    with pytest.raises(ValueError, match="its fingerprint is"):
        policy.select_action(preprocess(observation(dataset, [20])))


@pytest.mark.parametrize("shape", [(1, 32), (1, 2, 64), (64,)])
def test_tokens_of_a_wrong_shape_are_refused_at_deployment(dataset, store, shape):
    policy, preprocess = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    with pytest.raises(ValueError, match=r"expected \(B, 64\)"):
        policy.select_action(preprocess(observation(dataset, [20])) | {OBS_LAM_TOKENS: torch.zeros(shape)})


def test_fine_tuning_on_another_lam_records_that_lam(dataset, lam_folder, frames, tmp_path):
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_policy

    other = write_lam(tmp_path / "other", frames, seed=9)
    policy, _ = build(live_config(lam_folder), dataset)
    policy.save_pretrained(tmp_path / "first")
    overrides = [f"--lam_model_path={other}", "--lam_allow_mismatch=true"]
    config = PreTrainedConfig.from_pretrained(tmp_path / "first", cli_overrides=overrides)
    config.pretrained_path = tmp_path / "first"
    tuned = make_policy(config, ds_meta=dataset.meta)
    assert tuned.config.lam_fingerprint == load_lam(other).fingerprint
    assert tuned.config.lam_allow_mismatch is False


def test_a_batch_without_padding_flags_is_refused(dataset, lam_folder):
    policy, preprocess = build(live_config(lam_folder), dataset)
    batch = preprocess(training_batch(policy.config, dataset, [0, 20]))
    batch = {key: value for key, value in batch.items() if not key.endswith("_is_pad")}
    with pytest.raises(ValueError, match="which frames are padding"):
        policy.forward(batch)


def test_on_the_fly_refuses_a_dataset_with_tokens_of_its_own(dataset, lam_folder):
    meta = LeRobotDataset("local/squares", root=dataset.root, video_backend="pyav").meta
    meta.info.features[OBS_LAM_TOKENS] = {"dtype": "float32", "shape": (64,), "names": None}
    from lerobot.policies.factory import make_policy

    with pytest.raises(ValueError, match="has tokens of its own"):
        make_policy(live_config(lam_folder), ds_meta=meta)


def test_rollouts_sync_engine_computes_the_same_tokens(dataset, store):
    """`lerobot-rollout` hands over what a robot gives: arrays, images (H, W, 3) uint8."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.rollout.inference.sync import SyncInferenceEngine

    config = lam_config(lam_tokens_path=str(store.path), n_action_steps=2, num_inference_steps=1)
    policy, _ = build(config, dataset)
    policy.eval()
    processors = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    engine = SyncInferenceEngine(policy, *processors, dataset.meta.features, ["x", "y"], "wander", "cpu", "")
    engine.reset()
    recorded = ConditioningTokens(policy)
    rows = episode(dataset, 2)
    for row in rows:
        item = dataset[row]
        action = engine.get_action(
            {"observation.state": item["observation.state"].numpy(), TOP: item[TOP].permute(1, 2, 0).numpy()}
        )
        assert action.shape == (2,)
    expected = [store.window(torch.tensor([row]), [0]) for row in rows[::2]]
    assert len(recorded.seen) == len(expected)
    for got, want in zip(recorded.seen, expected, strict=True):
        assert_same_tokens(got, want, config.lam_token_scale, True)
    assert len(torch.cat(expected).unique(dim=0)) >= 4
