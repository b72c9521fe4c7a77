"""`lam_token_offsets`: which tokens condition, the same ones on every route; unset, all is as before."""

import json

import pytest
import torch

from lerobot_lam_diffusion import LamTokenDataset
from lerobot_lam_diffusion.tokens.add_column import add_column
from lerobot_lam_diffusion.tokens.joined import join_stores
from lerobot_lam_diffusion.utils.errors import DatasetError, TrainingError
from tests.conftest import EPISODE_LENGTHS, TOP, record_dataset
from tests.policies import (
    build,
    lam_config,
    live_config,
    make_lam_weights_matter,
    refused,
    teach,
    training_batch,
)

OFFSETS = list(range(-9, 10))
STARTS = [sum(EPISODE_LENGTHS[:e]) for e in range(len(EPISODE_LENGTHS))]
ENDS = [start + length for start, length in zip(STARTS, EPISODE_LENGTHS, strict=True)]
ROWS = [0, 5, ENDS[0] - 3, ENDS[0] - 1, ENDS[0], ENDS[-1] - 1]  # both ends of an episode, and of the dataset


def ahead_by_loop(store, index: int, offset: int) -> torch.Tensor:
    """token(index + offset): missing before the first `stride` frames and after the last frame."""
    episode = max(e for e, start in enumerate(STARTS) if start <= index)
    frame = max(index + offset, STARTS[episode])
    if frame >= ENDS[episode] or frame - STARTS[episode] < store.frame_stride:
        return torch.zeros(store.token_dim)
    row = int(store.episode_row[episode]) + frame - STARTS[episode]
    return store.decode(torch.tensor(row))


@pytest.fixture(scope="module")
def partial_store(dataset, make_store, tmp_path_factory):
    some = type(dataset)(
        dataset.repo_id, root=dataset.root, episodes=[1, 3], video_backend="pyav", return_uint8=True
    )
    return make_store(some, use_vq_tokens=False, frame_stride=2)


@pytest.fixture(scope="module")
def stride_3(dataset, make_store):
    return make_store(dataset, frame_stride=3)


@pytest.mark.parametrize("which", ["store", "stride_3", "partial_store"])
def test_a_window_ahead_is_zero_after_the_episode(which, request):
    store = request.getfixturevalue(which)
    episodes = torch.nonzero(store.episode_row >= 0).flatten().tolist()
    index = torch.cat([torch.arange(STARTS[e], ENDS[e]) for e in episodes])
    expected = torch.stack(
        [torch.stack([ahead_by_loop(store, int(i), offset) for offset in OFFSETS]) for i in index]
    )
    assert torch.equal(store.window(index, OFFSETS, ahead=True), expected)
    joined = join_stores([store])
    assert torch.equal(joined.window(index, [3, -1, 3], ahead=True), expected[:, [12, 8, 12]])


@pytest.mark.parametrize(
    ("offsets", "fixture"),
    [(list(range(1, 9)), "store"), ([-1, 0, 2], "stride_3")],
)
def test_all_routes_give_the_same_tokens_and_loss(offsets, fixture, dataset, lam_folder, request):
    store = request.getfixturevalue(fixture)
    by_store = lam_config(lam_tokens_path=str(store.path), lam_token_offsets=offsets)
    live = live_config(lam_folder, lam_frame_stride=store.frame_stride, lam_token_offsets=offsets)
    policies = {"store": build(by_store, dataset), "live": build(live, dataset)}
    batches = {"store": training_batch(by_store, dataset, ROWS), "live": training_batch(live, dataset, ROWS)}
    wrapped = LamTokenDataset(dataset, store, by_store.lam_token_deltas)
    batches["wrapped"] = dict(batches["store"]) | {
        wrapped.key: torch.stack([wrapped[row][wrapped.key] for row in ROWS])
    }
    del batches["wrapped"]["index"]
    policies["wrapped"] = policies["store"]

    told = {}
    for route, (policy, preprocess) in policies.items():
        policy.diffusion.unet.requires_grad_(True)
        batch = preprocess(batches[route])
        make_lam_weights_matter(policy)
        torch.manual_seed(2)
        told[route] = policy._window_tokens(batch), policy.forward(batch)[0]
    expected = torch.stack(
        [torch.stack([ahead_by_loop(store, row, offset) for offset in offsets]) for row in ROWS]
    )
    for tokens, loss in told.values():
        assert torch.equal(tokens, expected)
        assert torch.equal(loss, told["store"][1])
    if offsets[0] == 1:
        assert (expected == 0).all(2).sum(1).tolist() == [0, 0, 6, 8, 0, 8]


def test_offsets_of_the_past_are_the_default_bit_for_bit(dataset, store):
    told = []
    for fields in (
        {"lam_temporal_aggregation": "concat"},
        {"lam_token_offsets": [-1, 0]},
    ):
        config = lam_config(lam_tokens_path=str(store.path), **fields)
        policy, preprocess = build(config, dataset)
        batch = preprocess(training_batch(config, dataset, ROWS))
        teach(policy, batch, steps=2)
        torch.manual_seed(0)
        actions = policy.eval().predict_action_chunk(dict(batch))
        told.append((policy.state_dict(), actions))
    assert torch.equal(told[0][1], told[1][1])
    assert all(torch.equal(value, told[1][0][name]) for name, value in told[0][0].items())


def test_a_checkpoint_keeps_the_offsets_and_no_guidance(dataset, store, tmp_path):
    guide = f"{store.path}#0"  # for evaluations in training
    config = lam_config(lam_tokens_path=str(store.path), lam_token_offsets=[1, 2, 3], lam_guidance=guide)
    policy, _ = build(config, dataset)
    policy.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["lam_token_offsets"] == [1, 2, 3]
    assert saved["lam_conditioning_steps"] == 3
    assert saved["lam_fps"] == 10.0
    assert saved["lam_guidance"] is None
    assert type(policy).from_pretrained(tmp_path).config.lam_token_deltas == [1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lam_token_offsets": []}, "at least one"),
        ({"lam_token_offsets": [1.5]}, "whole frames"),
        ({"lam_token_offsets": [2, 1]}, "must ascend, each once: pass [1, 2]"),
        ({"lam_token_offsets": [1, 1]}, "must ascend"),
        ({"lam_token_offsets": [1, 2], "lam_conditioning_steps": 1}, "contradicts"),
        ({"lam_token_offsets": [1], "lam_temporal_aggregation": "concat"}, "leave one out"),
        ({"lam_guidance": "demo.mp4"}, "--policy.lam_token_offsets=[1,2,3,4,5,6,7,8]"),
        ({"lam_token_offsets": [0], "lam_guidance": "demo.mp4"}, "([0])"),
        ({"lam_fps": 0.0}, "lam_fps=0.0 must be"),
    ],
)
def test_contradictions_are_refused(fields, words):
    with refused(words):
        lam_config(**fields)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("demo.mp4#t=1.5,9", "demo.mp4#t=1.5,9"),
        ("[a.mp4,b.mp4]", ["a.mp4", "b.mp4"]),
        ("[a.mp4#t=1.5,9, data/lam#7]", ["a.mp4#t=1.5,9", "data/lam#7"]),
        (["a.mp4#t=1.5", 9, "b.mp4#t=", 2.5], ["a.mp4#t=1.5,9", "b.mp4#t=,2.5"]),
        ("", None),
    ],
)
def test_guidance_is_one_entry_or_a_list(written, meant):
    assert lam_config(lam_token_offsets=[1], lam_guidance=written).lam_guidance == meant


def test_a_column_has_no_tokens_of_what_comes_next(dataset, store, tmp_path):
    add_column(store, dataset.meta, tmp_path / "with")
    native = type(dataset)("local/with", root=tmp_path / "with", video_backend="pyav")
    with pytest.raises(DatasetError, match=r"lam_token_offsets=\[1, 2\].*token store"):
        build(lam_config(lam_token_offsets=[1, 2]), native)
    build(lam_config(lam_token_offsets=[-1, 0]), native)


def test_tokens_of_other_frames_are_refused(dataset, store):
    config = lam_config(lam_tokens_path=str(store.path), lam_token_offsets=[1, 2])
    policy, preprocess = build(config, dataset)
    batch = preprocess(training_batch(config, dataset, ROWS)) | {config.lam_tokens_key: torch.zeros(6, 3, 64)}
    with pytest.raises(
        TrainingError, match=r"shape \(6, 3, 64\), expected \(B, 2, 64\) = \(batch, frame offsets \[1, 2\]"
    ):
        policy.forward(batch)


@pytest.mark.slow
def test_two_cameras_look_ahead_side_by_side(make_store, tmp_path):
    cameras = [TOP, "observation.images.side"]
    data = record_dataset(tmp_path / "two", lengths=(9, 7), cameras=cameras)
    stores = [make_store(data, camera_key=camera) for camera in cameras]
    config = lam_config(lam_tokens_path=[str(each.path) for each in stores], lam_token_offsets=[1, 3])
    policy, preprocess = build(config, data)
    batch = preprocess(training_batch(config, data, [0, 7, 8]))
    tokens = policy._window_tokens(batch)
    index = torch.tensor([0, 7, 8])
    assert torch.equal(tokens, torch.cat([each.window(index, [1, 3], ahead=True) for each in stores], -1))
    assert tokens[1, 0].any()
    assert not tokens[1, 1].any()
    assert not tokens[2].any()
