"""Streamed datasets: every source of tokens trains alike; what LeRobot would deliver wrongly is refused."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.streaming_dataset import StreamingLeRobotDataset
from lerobot.scripts import lerobot_train
from lerobot.utils.constants import LOOKAHEAD_BACKTRACKTABLE, LOOKBACK_BACKTRACKTABLE
from lerobot.utils.import_utils import register_third_party_plugins
from safetensors.torch import load_file

from lerobot_lam_diffusion import LamTokenDataset
from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.streaming import StreamingGuard, is_streamed, training_flags
from lerobot_lam_diffusion.tokens.add_column import add_column
from tests.conftest import TOP, record_dataset
from tests.policies import build, lam_config, training_batch

needs_torchcodec = pytest.mark.torchcodec

STREAMED = ("--dataset.streaming=true", "--num_workers=1")
SMALL_FLAGS = [
    "--policy.type=diffusion_lam", "--policy.push_to_hub=false", "--policy.device=cpu",
    "--policy.pretrained_backbone_weights=null", "--policy.down_dims=[16,32]", "--policy.n_groups=4",
    "--policy.horizon=8", "--policy.n_action_steps=4", "--policy.drop_n_last_frames=3",
    "--dataset.repo_id=local/squares", "--batch_size=4", "--log_freq=1", "--seed=7", "--steps=3",
    "--dataloader_multiprocessing_context=fork",
]  # fmt: skip


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
    live = lam_config(
        use_precomputed_lam_tokens=False, lam_model_path=str(lam_folder), lam_camera_key=TOP, **fields
    )
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


def train(monkeypatch, *flags):
    """`lerobot-train` in this process."""
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *SMALL_FLAGS, *flags])
    register_third_party_plugins()
    lerobot_train.train()


@needs_torchcodec
@pytest.mark.slow
def test_lerobot_train_streams_all_alike(
    monkeypatch, dataset, with_column, torchcodec_store, lam_folder, tmp_path
):
    data = [*STREAMED, f"--dataset.root={dataset.root}"]
    precomputed = "--policy.use_precomputed_lam_tokens=true"
    live = [*data, f"--policy.lam_model_path={lam_folder}", f"--policy.lam_camera_key={TOP}"]
    kept = [*live, f"--policy.lam_live_cache={tmp_path / 'pairs'}"]
    routes = {
        "sidecar": [*data, precomputed, f"--policy.lam_tokens_path={torchcodec_store.path}"],
        "column": [*STREAMED, f"--dataset.root={with_column.root}", precomputed],
        "live": live,
        "live_cache": kept,
        "live_cache_again": kept,
    }
    weights = {}
    for name, flags in routes.items():
        train(monkeypatch, *flags, f"--output_dir={tmp_path / name}")
        checkpoint = tmp_path / name / "checkpoints" / "last" / "pretrained_model"
        weights[name] = load_file(checkpoint / "model.safetensors")
    for name in set(routes) - {"sidecar"}:
        assert all(torch.equal(value, weights[name][key]) for key, value in weights["sidecar"].items())
    saved = tmp_path / "sidecar" / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
    train(monkeypatch, f"--config_path={saved}", "--resume=true", "--steps=4")
    with pytest.raises(UserError, match=r"--dataset.episodes names 2 episodes"):
        train(monkeypatch, f"--config_path={saved}", "--resume=true", "--steps=5", "--dataset.episodes=[0,1]")


@needs_torchcodec
def test_frames_beyond_the_first_video_file_are_refused(several_files, make_store, lam_folder):
    """LeRobot delivers wrong frames there, some of them without a flag; the policy does not train on one."""
    told = (
        r"top': LeRobot's streaming seeks .* wrong for 2 of 3 episodes \(episode 1 begins at 0.00 s .*0.30 s"
    )
    store = make_store(several_files)
    for config in (
        lam_config(lam_tokens_path=str(store.path)),
        lam_config(use_precomputed_lam_tokens=False, lam_model_path=str(lam_folder), lam_camera_key=TOP),
    ):
        with pytest.raises(UserError, match=told):
            StreamingGuard(config, several_files.meta, STREAMED)
        policy, preprocessor = build(config, several_files)
        batch = streamed_batch(config, several_files, 8, buffer_size=1)
        with pytest.raises(UserError, match=told):
            policy.forward(preprocessor(batch))


@needs_torchcodec
def test_the_defects_of_lerobots_streaming_are_still_there(several_files):
    """What we refuse: where one of these fails, LeRobot has mended it, and the refusal can go."""
    here = LeRobotDataset("local/squares", root=several_files.root, video_backend="torchcodec")
    deltas = {TOP: [-0.1, 0.0]}
    streamed = StreamingLeRobotDataset(
        "local/squares", root=several_files.root, delta_timestamps=deltas, max_num_shards=1, buffer_size=1
    )
    first = [item for item, _ in zip(streamed, range(8), strict=False)]
    other = [item for item in first if not torch.equal(item[TOP][1], here[item["index"]][TOP])]
    assert other
    assert not any(item[f"{TOP}_is_pad"].any() for item in other)
    images = {"root": several_files.root, "max_num_shards": 1, "buffer_size": 1}
    some = StreamingLeRobotDataset("local/squares", episodes=[1], **images)
    assert next(iter(some))["episode_index"] == 0
    nothing = StreamingLeRobotDataset("local/squares", **{**images, "max_num_shards": 0})
    assert not list(nothing)


@needs_torchcodec
def test_a_batch_of_ones_own_loop_is_recognised(dataset, store, caplog):
    config = lam_config(lam_tokens_path=str(store.path))
    policy, preprocessor = build(config, dataset)
    batch = preprocessor(streamed_batch(config, dataset, 2))
    assert is_streamed(batch)
    for _ in range(2):
        policy.forward(batch)
    assert caplog.text.count("delivers all its episodes, whatever `episodes` says") == 1


REFUSED = {
    "episodes": (["--dataset.episodes=[3,0]"], r"names 2 episodes, .* train on all 5"),
    "no workers": (["--num_workers=0"], r"streams nothing, for ever: pass --num_workers=1"),
    "held-out episodes": (["--dataset.eval_split", "0.2"], r"in order instead of shuffling"),
}


@pytest.mark.parametrize(("flags", "told"), REFUSED.values(), ids=REFUSED)
def test_flags_that_lerobot_leaves_aside_are_refused(dataset, flags, told):
    with pytest.raises(UserError, match=told):
        StreamingGuard(lam_config(), dataset.meta, [*STREAMED, *flags])
    StreamingGuard(lam_config(), dataset.meta, flags)  # not streamed
    StreamingGuard(lam_config(use_lam_conditioning=False), dataset.meta, [*STREAMED, *flags])  # stock


def test_all_problems_are_told_before_a_store_is_opened_or_built(monkeypatch, dataset):
    """Of the flags, and whether torchcodec can be loaded here."""
    monkeypatch.setattr(
        sys, "argv", ["lerobot-train", *STREAMED, "--dataset.episodes=[0]", "--num_workers=0"]
    )
    with pytest.raises(UserError) as refused:
        build(lam_config(lam_tokens_path="nowhere"), dataset)
    for told in ("--dataset.episodes names 1 episodes", "--num_workers=0 LeRobot streams nothing"):
        assert told in str(refused.value)
    assert "nowhere" not in str(refused.value)


@needs_torchcodec
@pytest.mark.parametrize(
    "flags", [["--dataset.episodes=[4,3,2,1,0]"], ["--dataset.episodes=null"], ["--x=1"]]
)
def test_flags_that_ask_for_what_streaming_does(dataset, flags):
    StreamingGuard(lam_config(), dataset.meta, [*STREAMED, *flags])


def test_torchcodec_that_cannot_be_loaded(dataset, torchcodec_without_ffmpeg, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"(?s)FFmpeg is not properly installed.*libabsent\.so.*: cannot open"
    ):
        importlib.import_module("torchcodec")
    with pytest.raises(UserError, match=r"torchcodec alone, .*\(apt-get install ffmpeg"):
        StreamingGuard(lam_config(), dataset.meta, STREAMED)
    images = record_dataset(tmp_path / "images", (5, 4), use_videos=False)
    StreamingGuard(lam_config(), images.meta, STREAMED)
    with pytest.raises(UserError, match=r"does not apply --dataset.image_transforms.enable=true"):
        StreamingGuard(lam_config(), images.meta, [*STREAMED, "--dataset.image_transforms.enable=true"])


def test_windows_that_streaming_cannot_look_over(dataset):
    """LeRobot fills them up with copies of other frames, without a word in the loss."""
    fields = {"use_precomputed_lam_tokens": False, "lam_model_path": "x", "lam_camera_key": TOP}
    StreamingGuard(lam_config(lam_frame_stride=LOOKBACK_BACKTRACKTABLE - 1, **fields), dataset.meta, [])
    guard = StreamingGuard(lam_config(lam_frame_stride=LOOKBACK_BACKTRACKTABLE, **fields), dataset.meta, [])
    streamed = {"timestamp": torch.zeros(2, dtype=torch.float64)}
    guard.check({"timestamp": torch.zeros(2)})
    with pytest.raises(UserError, match=r"looks 100 frames back, LeRobot's streaming 99 at most"):
        guard.check(streamed)
    assert LOOKAHEAD_BACKTRACKTABLE == 100
    StreamingGuard(lam_config(horizon=100), dataset.meta, []).check(streamed)
    with pytest.raises(UserError, match=r"up to 102 frames ahead, LeRobot's streaming looks 100"):
        StreamingGuard(lam_config(horizon=104), dataset.meta, []).check(streamed)


def test_a_video_frame_that_is_flagged_by_a_rounding_error_has_its_token(dataset, store, lam_folder):
    """LeRobot's streaming compares float32 seconds: it flags frames of long videos, yet delivers them."""
    config = lam_config(use_precomputed_lam_tokens=False, lam_model_path=str(lam_folder), lam_camera_key=TOP)
    batch = training_batch(config, dataset, [0, 1, 5])
    batch[f"{TOP}_is_pad"] = batch[f"{TOP}_is_pad"].clone()
    batch[f"{TOP}_is_pad"][1, 0] = True
    policy, preprocessor = build(config, dataset)
    tokens = policy._window_tokens(preprocessor(batch))
    assert torch.equal(tokens, store.window(batch["index"], [0]))


def test_flags_are_read_as_lerobot_reads_them(tmp_path):
    yaml, saved = tmp_path / "train.yaml", tmp_path / "train_config.json"
    yaml.write_text("dataset: {streaming: true, episodes: [1, 2]}\nnum_workers: 2\npolicy: {type: x}\n")
    saved.write_text(json.dumps({"dataset": {"streaming": True, "image_transforms": {"enable": False}}}))
    of_yaml = {"dataset.streaming": True, "dataset.episodes": [1, 2], "num_workers": 2}
    of_saved = {"dataset.streaming": True, "dataset.image_transforms.enable": False}
    for arguments, expected in {
        (): {},
        ("-q", "tests", "--dataset.repo_id=x"): {},
        ("--dataset.streaming", "true", "--num_workers=4"): {"dataset.streaming": True, "num_workers": 4},
        ("--num_workers=0", "--num_workers=2"): {"num_workers": 2},
        (f"--config_path={yaml}",): of_yaml,
        ("--config_path", str(yaml), "--dataset.streaming=false"): {**of_yaml, "dataset.streaming": False},
        (f"--config_path={saved}", "--resume=true"): of_saved,
        (f"--config_path={tmp_path}",): of_saved,
        ("--config_path=user/name",): {},
    }.items():
        assert training_flags(arguments) == expected
    Path(yaml).write_text("a: [")
    assert training_flags([f"--config_path={yaml}"]) == {}


@needs_torchcodec
def test_lam_token_dataset_says_that_it_is_for_map_style_datasets(dataset, store):
    streamed = StreamingLeRobotDataset("local/squares", root=dataset.root)
    with pytest.raises(UserError, match=r"map-style .*--policy.lam_tokens_path"):
        LamTokenDataset(streamed, store)
