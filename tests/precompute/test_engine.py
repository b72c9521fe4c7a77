"""The invariant: token(i) = LAM(frame i - stride, frame i) inside an episode, else missing. And atomicity."""

import os
from types import SimpleNamespace

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute import encode
from lerobot_lam_diffusion.precompute import frames as frames_module
from lerobot_lam_diffusion.precompute.encode import LARGEST_BATCH, find_batch_size
from lerobot_lam_diffusion.precompute.frames import DecodeError
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError, writer
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import EPISODE_LENGTHS, TOP, record_dataset, write_lam
from tests.precompute.conftest import Wrapped

STRIDES = [1, 3, 10, 100]  # 10: longer than two episodes, 100: than all
TOLERANCE = 2e-4
"""Of continuous tokens. Measured: 5e-5 between batches of 1 and 8 (other kernels), 0 between 4, 7, 8 and 28.
The LAM of the tests is that ill-conditioned (4e-5 from its float64 self); its nearest tokens are 1 apart."""


@pytest.fixture(scope="module")
def expected_tokens(frames, lam):
    """`expected_tokens(stride, vq)`: the invariant spelled out, pair by pair, `(N, n·a)`."""

    def expected(stride: int, vq: bool = True) -> torch.Tensor:
        tokens = torch.zeros(len(frames), lam.token_dim)
        start = 0
        for length in EPISODE_LENGTHS:
            for i in range(start + stride, start + length):
                pair = lam.encode_pairs(frames[i - stride, None], frames[i, None])
                tokens[i] = (pair.quantized if vq else pair.continuous)[0]
            start += length
        return tokens

    return expected


def everything(store: TokenStore) -> torch.Tensor:
    return store.window(torch.arange(store.num_frames), [0])[:, 0]


@pytest.mark.parametrize("stride", STRIDES)
def test_vq_tokens_are_the_lams_own_bit_for_bit(make_store, dataset, expected_tokens, stride):
    tokens = everything(make_store(dataset, frame_stride=stride))
    assert torch.equal(tokens, expected_tokens(stride))
    assert (len(tokens.unique(dim=0)) >= 5) == (stride < 100)


@pytest.mark.parametrize("stride", STRIDES)
def test_continuous_tokens_are_the_lams_own(make_store, dataset, expected_tokens, stride):
    tokens = everything(make_store(dataset, frame_stride=stride, use_vq_tokens=False))
    expected = expected_tokens(stride, vq=False)
    torch.testing.assert_close(tokens, expected, atol=TOLERANCE, rtol=0)
    if stride < 100:  # the tolerance tells pairs apart
        present = tokens[tokens.any(1)]
        distance = torch.cdist(present, present) + torch.eye(len(present))
        assert distance.min() > 100 * TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 7, 8, 64])
def test_vq_store_does_not_depend_on_the_batch_size(make_store, dataset, store, batch_size):
    assert torch.equal(make_store(dataset, batch_size=batch_size).values, store.values)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_continuous_store_hardly_depends_on_the_batch_size(make_store, dataset, continuous_store, batch_size):
    other = make_store(dataset, use_vq_tokens=False, batch_size=batch_size)
    torch.testing.assert_close(other.values, continuous_store.values, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("use_vq_tokens", [True, False])
@pytest.mark.parametrize("chunk_frames", [1, 5])
def test_store_does_not_depend_on_how_episodes_are_decoded(
    make_store, dataset, monkeypatch, chunk_frames, use_vq_tokens
):
    whole = make_store(dataset, use_vq_tokens=use_vq_tokens, frame_stride=3)
    monkeypatch.setattr(frames_module, "CHUNK_FRAMES", chunk_frames)
    assert torch.equal(make_store(dataset, use_vq_tokens=use_vq_tokens, frame_stride=3).values, whole.values)


@pytest.mark.parametrize("episodes", [[0], [3, 1], [4, 2, 0], [4, 3, 2, 1, 0]])
def test_an_episode_subset_has_the_rows_of_the_full_store(
    make_store, dataset, store, continuous_store, episodes
):
    subset = LeRobotDataset(dataset.repo_id, root=dataset.root, episodes=episodes, video_backend="pyav")
    covered = [i for i, e in enumerate(dataset.hf_dataset["episode_index"]) if int(e) in episodes]
    index = torch.tensor(covered)
    partial = make_store(subset)
    assert len(partial.values) == len(covered)
    assert partial.provenance.dataset == store.provenance.dataset
    assert torch.equal(partial.window(index, [-2, 0, 1]), store.window(index, [-2, 0, 1]))
    torch.testing.assert_close(
        make_store(subset, use_vq_tokens=False).window(index, [0]),
        continuous_store.window(index, [0]),
        atol=TOLERANCE,
        rtol=0,
    )


@pytest.mark.parametrize(("use_videos", "return_uint8"), [(True, True), (False, False)])
def test_the_named_camera_of_video_and_image_datasets(tmp_path, extract, lam, use_videos, return_uint8):
    cameras = (TOP, "observation.images.wrist")
    recorded = record_dataset(tmp_path / "data", (6, 5), cameras, use_videos)
    dataset = LeRobotDataset("local/x", root=recorded.root, video_backend="pyav", return_uint8=return_uint8)
    frames = torch.stack([dataset[i][cameras[1]] for i in range(11)])
    frames = frames if frames.dtype == torch.uint8 else (frames * 255).round().to(torch.uint8)
    tokens = everything(extract(of=dataset, camera_key=cameras[1]).store)
    expected = lam.encode_pairs(frames[:-1], frames[1:]).quantized
    present = [*range(1, 6), *range(7, 11)]
    assert torch.equal(tokens[present], expected[[i - 1 for i in present]])
    assert not tokens[[0, 6]].any()


def test_a_codebook_of_more_than_256_rows(tmp_path_factory, frames, extract):
    # 60 frames give 118 tokens only: one vector stands for many neighbouring rows, told apart by tiny steps.
    folder = write_lam(tmp_path_factory.mktemp("wide") / "lam", frames.repeat(3, 1, 1, 1), n_codes=300)
    lam = load_lam(folder)
    lam.codebook.copy_(lam.codebook + 1e-3 * torch.randn(300, 32, generator=torch.Generator().manual_seed(0)))
    store = extract(lam).store
    assert store.values.dtype == torch.uint16
    assert store.values.int().max() > 255
    index = torch.arange(1, 14)
    expected = lam.encode_pairs(frames[:13], frames[1:14])
    assert torch.equal(store.values[1:14].long(), expected.indices)
    assert torch.equal(store.window(index, [0])[:, 0], expected.quantized)


@pytest.mark.parametrize("stride", STRIDES)
def test_summary_tells_what_was_made(extract, stride):
    summary = extract(frame_stride=stride)
    assert summary.encoded == summary.store.num_tokens == int(everything(summary.store).any(1).sum())
    assert 0 <= summary.waited <= summary.seconds


def test_provenance_records_the_stride_in_seconds_and_the_arithmetic(extract, lam_folder):
    lam = load_lam(lam_folder, dtype=torch.bfloat16)
    provenance = extract(lam, frame_stride=5).store.provenance
    assert (provenance.frame_stride, provenance.stride_seconds, provenance.dtype) == (5, 0.5, "bfloat16")
    assert provenance.lam.path == "a/lam"


def test_the_lam_sees_batches_of_one_shape(extract, lam):
    shapes = set()

    def spy(prev, cur):
        shapes.add((tuple(prev.shape), tuple(cur.shape)))
        return lam.encode_pairs(prev, cur)

    extract(Wrapped(lam, spy), batch_size=8)
    assert shapes == {((8, 3, 32, 32),) * 2}  # at the LAM's own size: each frame is resized once


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "ctrl-c"]
)
def test_a_failure_in_the_middle_leaves_no_store_and_the_next_run_goes_on(
    extract, lam, store, tmp_path, error
):
    calls = []

    def fail_later(prev, cur):
        calls.append(prev)
        if len(calls) == 4:
            raise error
        return lam.encode_pairs(prev, cur)

    with pytest.raises(type(error)):
        extract(Wrapped(lam, fail_later), shard_frames=1, num_workers=0)
    assert len(calls) == 4
    assert os.listdir(tmp_path) == ["store.shards"]
    summary = extract(shard_frames=1)
    assert 0 < summary.encoded < 55  # the first episodes' 3 x 8 pairs were safe
    assert torch.equal(summary.store.values, store.values)
    assert os.listdir(tmp_path) == ["store"]


def test_a_failure_while_writing_leaves_no_store(extract, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        extract()
    assert os.listdir(tmp_path) == ["store.shards"]
    monkeypatch.undo()
    summary = extract()
    assert (len(summary.store.values), summary.encoded) == (60, 0)


def test_an_existing_output_is_refused_before_any_work(extract, lam, tmp_path):
    def not_called(*_):
        raise AssertionError("work was begun")

    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine").touch()
    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        extract(Wrapped(lam, not_called))
    assert os.listdir(tmp_path / "store") == ["mine"]


def test_a_finished_store_is_not_made_again(extract, lam, tmp_path):
    first = extract()

    def not_called(*_):
        raise AssertionError("work was begun")

    again = extract(Wrapped(lam, not_called))
    assert (again.encoded, again.store.path) == (0, first.store.path)
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize("shard_frames", [1, 20, None])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_neither_shards_nor_workers_change_the_store(extract, store, shard_frames, num_workers):
    made = extract(shard_frames=shard_frames, num_workers=num_workers).store
    assert torch.equal(made.values, store.values)


def test_the_batch_size_is_found_out(extract, store):
    summary = extract(batch_size=None)
    assert 8 <= summary.batch_size <= 64
    assert torch.equal(summary.store.values, store.values)


@pytest.fixture
def damaged(tmp_path):
    """Ten episodes in several video files, one of which is cut off; and the episodes in it."""
    recorded = record_dataset(tmp_path / "data", (5, 6, 8, 3, 4, 6, 7, 7, 5, 9), file_size_mb=0.012)
    files = [recorded.meta.get_video_file_path(episode, TOP) for episode in range(10)]
    frames = torch.stack([recorded[i][TOP] for i in range(60)])
    path = tmp_path / "data" / files[4]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return recorded, frames, [episode for episode in range(10) if files[episode] == files[4]]


def test_an_episode_that_cannot_be_read_stops_the_run_or_is_skipped(damaged, extract, lam):
    dataset, frames, in_file = damaged
    with pytest.raises(DecodeError, match=r"of episode \d .* cannot be read from .*Fetch or repair"):
        extract(of=dataset, shard_frames=1)
    store = extract(of=dataset, shard_frames=1, skip_unreadable=True).store
    skipped = sorted(store.skipped)
    assert skipped
    assert set(skipped) <= set(in_file)
    assert len(in_file) < 10
    assert store.missing_episodes == skipped
    assert all("cannot be read" in reason for reason in store.skipped.values())
    expected = lam.encode_pairs(frames[:-1], frames[1:]).quantized
    for episode in set(range(10)) - set(skipped):
        index = torch.arange(store.episode_from[episode], store.episode_to[episode])
        tokens = store.window(index, [0])[:, 0]
        assert not tokens[0].any()
        assert torch.equal(tokens[1:], expected[index[1:] - 1])
    with pytest.raises(TokenStoreError, match=f"episode {skipped[0]}.*skipped"):
        store.window(store.episode_from[skipped[:1]], [0])


def test_an_unreadable_episode_without_pairs_costs_nothing(damaged, extract):
    dataset, _, _ = damaged
    store = extract(of=dataset, frame_stride=9, shard_frames=1, skip_unreadable=True).store
    assert store.skipped == {}  # all are shorter than the stride: no tokens to lose
    assert not everything(store).any()


def test_a_slow_first_batch_does_not_decide_the_batch_size(lam, monkeypatch):
    """Here the first batch takes seconds, and the others 10 ms whatever their size."""
    now, sizes = 0.0, []

    def slow_at_first(prev, cur):
        nonlocal now
        now += 0.01 if sizes else 3.0
        sizes.append(len(prev))
        return lam.encode_pairs(prev, cur)

    monkeypatch.setattr(encode, "time", SimpleNamespace(perf_counter=lambda: now))
    assert find_batch_size(Wrapped(lam, slow_at_first), 10_000) == LARGEST_BATCH["cpu"]
    assert sizes[0] < sizes[1]  # the slow one warms up


@pytest.mark.parametrize("lacking", ["without_folder_sync", "without_locks", "without_links"])
@pytest.mark.parametrize("use_vq_tokens", [True, False])
def test_file_systems_that_lack_something(
    extract, make_store, dataset, request, caplog, tmp_path, lacking, use_vq_tokens
):
    expected = make_store(dataset, use_vq_tokens=use_vq_tokens)
    request.getfixturevalue(lacking)
    made = extract(use_vq_tokens=use_vq_tokens, shard_frames=1).store
    assert torch.equal(made.values, expected.values)
    assert ("cannot be locked" in caplog.text) == (lacking == "without_locks")
    assert os.listdir(tmp_path) == ["store"]
    index = torch.arange(60)
    again = TokenStore.open(made.path, dataset.meta)
    assert torch.equal(again.window(index, [-1, 0]), expected.window(index, [-1, 0]))


@pytest.mark.parametrize("shard_frames", [1, None])
def test_nothing_but_skipped_episodes_is_a_failure_and_extracts_once_repaired(
    unreadable, extract, tmp_path, shard_frames
):
    dataset, path, video = unreadable
    options = {"of": dataset, "skip_unreadable": True, "shard_frames": shard_frames}
    with pytest.raises(UserError, match=r"all 2 episodes .* were skipped \(episode 0: .*Fetch or repair"):
        extract(**options)
    assert os.listdir(tmp_path) == ["data"]  # no store, and no shards that would pass for finished work
    path.write_bytes(video)
    assert extract(**options).store.num_tokens == 4 + 2


def test_episodes_too_short_for_a_token_are_no_reason_for_a_store(unreadable, extract):
    with pytest.raises(UserError, match="all 1 episodes"):  # episode 1 has no token anyway
        extract(of=unreadable[0], skip_unreadable=True, frame_stride=3)
