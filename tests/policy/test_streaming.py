"""Streamed datasets: every source of tokens trains alike; what LeRobot would deliver wrongly is refused."""

import pytest
import torch
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.streaming_dataset import StreamingLeRobotDataset
from lerobot.utils.constants import LOOKAHEAD_BACKTRACKTABLE, LOOKBACK_BACKTRACKTABLE

from lerobot_lam_diffusion import LamTokenDataset
from lerobot_lam_diffusion.policy.streaming import is_streamed, refuse_wrong_streaming
from lerobot_lam_diffusion.tokens.add_column import add_column
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import TOP, record_dataset
from tests.policies import build, lam_config, live_config, training_batch
from tests.test_lerobot_train import SMALL_FLAGS, on_the_fly, same, train, weights

needs_torchcodec = pytest.mark.torchcodec
STREAMED = {"timestamp": torch.zeros(2, dtype=torch.float64)}


@pytest.fixture(scope="module")
def torchcodec_store(dataset, make_store):
    """Tokens of the very pixels that streaming delivers."""
    return make_store(LeRobotDataset("local/squares", root=dataset.root, video_backend="torchcodec"))


@pytest.fixture(scope="module")
def with_column(dataset, torchcodec_store, tmp_path_factory):
    made = add_column(torchcodec_store, dataset.meta, tmp_path_factory.mktemp("column") / "data")
    return LeRobotDataset("local/squares", root=made.root)


@pytest.fixture(scope="module")
def several_files(tmp_path_factory):
    """Its first video file holds one short episode: the frames of the later ones are sought far too late."""
    return record_dataset(tmp_path_factory.mktemp("files") / "data", (3, 20, 20), file_size_mb=0.001)


def streamed_batch(config, dataset, size: int = 60, **options) -> dict:
    """The first frames that LeRobot streams, collated, as float images like those of `lerobot-train`."""
    deltas = resolve_delta_timestamps(config, dataset.meta)
    options = {"max_num_shards": 1, "delta_timestamps": deltas, **options}
    streamed = StreamingLeRobotDataset(dataset.repo_id, root=dataset.root, **options)
    return next(iter(torch.utils.data.DataLoader(streamed, batch_size=size)))


# Streaming gives every frame the token of every other route.


@needs_torchcodec
@pytest.mark.parametrize(
    "fields", [{}, {"lam_frame_stride": 3}, {"lam_temporal_aggregation": "concat"}], ids=str
)
def test_every_frame_gets_its_token_whatever_the_source(
    dataset, with_column, torchcodec_store, make_store, lam_folder, fields
):
    """Also at episode starts, where streaming pads; and the losses are the same bit for bit."""
    store = torchcodec_store
    if "lam_frame_stride" in fields:
        torchcodec = LeRobotDataset("local/squares", root=dataset.root, video_backend="torchcodec")
        store = make_store(torchcodec, frame_stride=3)
    live = live_config(lam_folder, **fields)
    fields = {**fields, "lam_conditioning_steps": live.lam_conditioning_steps}
    routes = [(live, dataset), (lam_config(lam_tokens_path=str(store.path), **fields), dataset)]
    if store is torchcodec_store:
        routes.append((lam_config(**fields), with_column))
    losses = []
    for config, source in routes:
        batch = streamed_batch(config, source)
        assert sorted(batch["index"].tolist()) == list(range(60))
        policy, preprocessor = build(config, source)
        tokens = policy._window_tokens(preprocessor(batch))
        assert torch.equal(tokens, store.window(batch["index"], config.lam_token_deltas))
        torch.manual_seed(3)
        losses.append(policy.forward(preprocessor({key: value[:8] for key, value in batch.items()}))[0])
    assert len({loss.item() for loss in losses}) == 1


def test_a_video_frame_that_is_flagged_by_a_rounding_error_has_its_token(dataset, store, lam_folder):
    """LeRobot's streaming compares float32 seconds: it flags frames of long videos, yet delivers them."""
    config = live_config(lam_folder)
    batch = training_batch(config, dataset, [0, 1, 5])
    batch[f"{TOP}_is_pad"] = batch[f"{TOP}_is_pad"].clone()
    batch[f"{TOP}_is_pad"][1, 0] = True
    policy, preprocessor = build(config, dataset)
    tokens = policy._window_tokens(preprocessor(batch))
    assert torch.equal(tokens, store.window(batch["index"], [0]))


@needs_torchcodec
@pytest.mark.slow
def test_lerobot_train_streams_all_alike(
    monkeypatch, dataset, with_column, torchcodec_store, lam_folder, tmp_path
):
    small = [*SMALL_FLAGS, "--steps=3", "--dataset.streaming=true", "--num_workers=1"]
    small.append("--dataloader_multiprocessing_context=fork")
    data = f"--dataset.root={dataset.root}"
    live = [data, *on_the_fly(lam_folder)]
    cached = [*live, f"--policy.lam_live_cache={tmp_path / 'pairs'}"]
    routes = {
        "sidecar": [data, f"--policy.lam_tokens_path={torchcodec_store.path}"],
        "column": [f"--dataset.root={with_column.root}"],
        "live": live,
        "live_cache": cached,
        "live_cache_again": cached,
    }
    for name, flags in routes.items():
        train(monkeypatch, *small, *flags, f"--output_dir={tmp_path / name}")
    trained = {name: weights(tmp_path / name) for name in routes}
    assert [name for name in routes if not same(trained["sidecar"], trained[name])] == []
    saved = tmp_path / "sidecar" / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
    train(monkeypatch, f"--config_path={saved}", "--resume=true", "--steps=4")


# What LeRobot would deliver wrongly is refused with the first batch, before the first step.


@needs_torchcodec
def test_frames_beyond_the_first_video_file_are_refused(several_files, make_store, lam_folder):
    """LeRobot delivers wrong frames there, some of them without a flag; the policy does not train on one."""
    message = (
        r"top': LeRobot's streaming seeks .* wrong for 2 of 3 episodes \(episode 1 begins at 0.00 s .*0.30 s"
    )
    for config in (lam_config(lam_tokens_path=str(make_store(several_files).path)), live_config(lam_folder)):
        policy, preprocessor = build(config, several_files)
        batch = streamed_batch(config, several_files, 8, buffer_size=1)
        for _ in range(2):
            with pytest.raises(UserError, match=message):
                policy.forward(preprocessor(batch))


def test_a_streamed_batch_is_refused_whenever_it_comes(several_files, make_store):
    config = lam_config(lam_tokens_path=str(make_store(several_files).path))
    policy, preprocessor = build(config, several_files)
    batch = preprocessor(training_batch(config, several_files, [1, 2]))
    policy.forward(batch)  # of the dataset on disk
    batch |= STREAMED
    for _ in range(2):
        with pytest.raises(UserError, match="wrong for 2 of 3 episodes"):
            policy.forward(batch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lam_frame_stride": LOOKBACK_BACKTRACKTABLE - 1}, None),
        (
            {"lam_frame_stride": LOOKBACK_BACKTRACKTABLE},
            "looks 100 frames back, LeRobot's streaming 99 at most",
        ),
        ({"horizon": LOOKAHEAD_BACKTRACKTABLE}, None),
        (
            {"horizon": LOOKAHEAD_BACKTRACKTABLE + 4},
            "up to 102 frames ahead, LeRobot's streaming 100 at most",
        ),
        ({"lam_token_offsets": [101]}, "looks 101 frames ahead, LeRobot's streaming 100 at most"),
    ],
)
def test_windows_that_streaming_cannot_look_over(dataset, fields, message):
    """LeRobot fills them up with copies of other frames, without a word in the loss."""
    config = live_config("x", **fields)
    if message is None:
        refuse_wrong_streaming(config, dataset.meta)
    else:
        with pytest.raises(UserError, match=message):
            refuse_wrong_streaming(config, dataset.meta)


@needs_torchcodec
def test_a_streamed_batch_is_recognised_and_warned_of_once(dataset, store, caplog):
    config = lam_config(lam_tokens_path=str(store.path))
    policy, preprocessor = build(config, dataset)
    batch = preprocessor(streamed_batch(config, dataset, 2))
    assert is_streamed(batch)
    for _ in range(2):
        policy.forward(batch)
    assert caplog.text.count("delivers all its episodes, whatever `episodes` says") == 1


@needs_torchcodec
def test_lam_token_dataset_says_that_it_is_for_map_style_datasets(dataset, store):
    streamed = StreamingLeRobotDataset("local/squares", root=dataset.root)
    with pytest.raises(UserError, match=r"map-style .*--policy.lam_tokens_path"):
        LamTokenDataset(streamed, store)
