"""The store as its users see it: the join of tokens to frames, and what it does where it has no token."""

import logging
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.datasets.dataset_tools import add_features
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from tests.conftest import EPISODE_LENGTHS, FPS

REACH = 20  # longer than any episode
COLUMNS = {"vq": "observation.lam_tokens", "continuous, stride 3": "observation.continuous"}


@pytest.fixture(scope="module")
def stores(dataset, store, make_store):
    return {"vq": store, "continuous, stride 3": make_store(dataset, use_vq_tokens=False, frame_stride=3)}


@pytest.fixture(scope="module")
def lerobot_windows(dataset, stores, tmp_path_factory):
    """The stores' tokens as native columns: what LeRobot itself delivers for the deltas -REACH … REACH.

    Kind → `(N, 2 * REACH + 1, token_dim)`.
    """
    info = {"dtype": "float32", "shape": (64,), "names": None}
    everything = torch.arange(len(dataset))
    columns = {
        COLUMNS[kind]: (store.window(everything, [0])[:, 0].numpy(), info) for kind, store in stores.items()
    }
    root = tmp_path_factory.mktemp("native") / "data"
    add_features(dataset, columns, output_dir=root, repo_id="local/native")
    deltas = [delta / FPS for delta in range(-REACH, REACH + 1)]
    native = LeRobotDataset(
        "local/native",
        root=root,
        delta_timestamps=dict.fromkeys(COLUMNS.values(), deltas),
        video_backend="pyav",
    )
    items = [native[i] for i in range(len(native))]
    return {kind: torch.stack([item[column] for item in items]) for kind, column in COLUMNS.items()}


def test_tokens_are_many_and_not_zero_so_that_comparisons_say_something(stores):
    assert len(stores["vq"].values.unique()) >= 8
    assert all(perplexity > 4 for perplexity in stores["vq"].code_perplexity())
    for store in stores.values():
        tokens = store.window(store.frames_with_tokens(), [0])[:, 0]
        assert tokens.any(1).all()
        assert len(tokens.unique(dim=0)) >= 8


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_frame_and_every_delta_agrees_with_lerobot(stores, lerobot_windows, kind):
    expected = lerobot_windows[kind]
    window = stores[kind].window(torch.arange(len(expected)), list(range(-REACH, REACH + 1)))
    assert window.dtype == torch.float32
    assert torch.equal(window, expected)


@settings(max_examples=60)
@given(data=st.data())
def test_window_of_any_store_clamps_to_the_episode_and_zeroes_what_is_missing(write_random, data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    covered = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    stride = data.draw(st.integers(1, 7))
    kind = data.draw(st.sampled_from(["vq", "continuous"]))
    deltas = data.draw(st.lists(st.integers(-9, 9), max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        store = write_random(Path(folder) / "store", lengths, covered, frame_stride=stride, token_kind=kind)
        rows = iter(store.values)
        frame = 0
        for episode, length in enumerate(lengths):
            index = torch.arange(frame, frame + length)
            frame += length
            if not covered[episode]:
                with pytest.raises(
                    TokenStoreError, match=f"lacks episode {episode}, which frame {index[0]} "
                ):
                    store.window(index, deltas)
                continue
            tokens = []
            for offset in range(length):
                row = next(rows)
                token = row if store.codebook is None else store.codebook[row.long()].flatten()
                tokens.append(token if offset >= stride else torch.zeros(store.token_dim))
            expected = torch.zeros(length, len(deltas), store.token_dim)
            for i in range(length):
                for t, delta in enumerate(deltas):
                    expected[i, t] = tokens[max(0, min(length - 1, i + delta))]
            assert torch.equal(store.window(index, deltas), expected)


def test_partial_store_lists_only_its_own_frames(partial_store):
    starts = torch.tensor(EPISODE_LENGTHS).cumsum(0) - torch.tensor(EPISODE_LENGTHS)
    expected = [int(starts[e]) + i for e in (1, 3) for i in range(1, EPISODE_LENGTHS[e])]
    assert partial_store.frames_with_tokens().tolist() == expected
    assert partial_store.missing_episodes == [0, 2, 4]


def test_partial_store_warns_at_open_which_episodes_it_covers(partial_store, caplog):
    with caplog.at_level(logging.WARNING):
        TokenStore.open(partial_store.path)
    assert "is partial: it covers 2 of 5 episodes (1, 3)" in caplog.text


def test_whole_store_opens_without_a_warning(store, caplog):
    with caplog.at_level(logging.WARNING):
        TokenStore.open(store.path)
    assert not caplog.records
    assert store.coverage == "it covers all 5 episodes"


def test_window_names_the_episode_and_the_frame_that_a_partial_store_lacks(partial_store):
    with pytest.raises(TokenStoreError) as error:
        partial_store.window(torch.tensor([15, 42, 30]), [0])
    told = str(error.value)
    assert "lacks episode 4" not in told
    assert "lacks episode 2, which frame 30 belongs to" in told
    assert "it covers 2 of 5 episodes (1, 3)" in told
    assert "lerobot-lam-precompute" in told
    assert "--dataset.episodes" in told


@pytest.mark.parametrize("frame", [-1, 60, 2**40])
def test_window_refuses_a_frame_outside_the_dataset(store, frame):
    with pytest.raises(
        TokenStoreError, match=rf"has no frame {frame}: its dataset has 60 frames.*this dataset"
    ):
        store.window(torch.tensor([3, frame]), [0])


def test_window_takes_a_batch_of_any_size_and_refuses_offsets_that_are_not_whole(store):
    assert store.window(torch.tensor([], dtype=torch.int64), [-1, 0]).shape == (0, 2, 64)
    assert store.window(torch.tensor([3, 4]), []).shape == (2, 0, 64)
    assert store.window(torch.tensor(7), [0]).shape == (1, 1, 64)
    with pytest.raises(TypeError):
        store.window(torch.tensor([3]), [-0.1])


@pytest.mark.parametrize("num_codes", [256, 257, 300])
def test_indices_take_two_bytes_only_where_the_codebook_needs_them(write_random, tmp_path, num_codes):
    store = write_random(tmp_path / "store", [200, 100], num_codes=num_codes)
    assert store.values.dtype == (torch.uint8 if num_codes <= 256 else torch.uint16)
    codes = store.values.int()
    assert codes.max() > 250
    tokens = store.window(torch.arange(300), [0])[:, 0]
    assert torch.equal(tokens[1:200], store.codebook[codes[1:200]].flatten(1))
    assert store.code_perplexity()[0] > 100


def test_perplexity_leaves_out_missing_tokens(write_random, tmp_path):
    store = write_random(tmp_path / "store", [50, 50, 2], frame_stride=2, num_codes=4)
    present = torch.cat([store.values[2:50], store.values[52:100]])
    for slot, perplexity in enumerate(store.code_perplexity()):
        share = torch.bincount(present[:, slot].long()).double() / len(present)
        assert perplexity == pytest.approx(float(torch.exp(-(share * share.log()).sum())))
    assert 2 < perplexity <= 4


def test_continuous_store_has_no_codes_to_count(continuous_store):
    assert continuous_store.codebook is None
    assert continuous_store.code_perplexity() == []


def test_store_opens_by_its_folder_or_either_file_as_text_or_path(store):
    for path in (store.path, str(store.path), *store.path.iterdir()):
        assert torch.equal(TokenStore.open(path).values, store.values)


def test_a_worker_refuses_a_store_that_was_replaced_meanwhile(write_random, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = TokenStore.open(write_random(Path("store"), [4, 5]).path)
    sent = pickle.dumps(store)
    assert len(sent) < 1000  # its path, not its tokens
    monkeypatch.chdir("/")  # a relative path would now mean another place
    copy, index = pickle.loads(sent), torch.arange(9)
    assert torch.equal(copy.window(index, [-1, 0]), store.window(index, [-1, 0]))
    assert copy.provenance == store.provenance
    shutil.rmtree(tmp_path / "store")
    write_random(tmp_path / "store", [4, 5], frame_stride=2)
    with pytest.raises(TokenStoreError, match="was replaced while it was in use"):
        pickle.loads(sent)


SKIPPED = {"0": "video/0.mp4 is cut", "3": "no such file"}


def test_a_skipped_episode_is_told_with_its_reason(write_random, tmp_path):
    store = write_random(tmp_path / "store", [4, 4, 4, 4], [False, True, False, False], skipped=SKIPPED)
    assert store.coverage == (
        "it covers 1 of 4 episodes (1); extraction skipped episode 0 (video/0.mp4 is cut), "
        "episode 3 (no such file)"
    )
    with pytest.raises(
        TokenStoreError, match=r"lacks episode 3, .* 13 belongs to \(extraction skipped it: no such file\)"
    ):
        store.window(torch.tensor([13]), [0])
    with pytest.raises(TokenStoreError, match="lacks episode 2, which frame 9 belongs to;"):
        store.window(torch.tensor([9]), [0])


def test_many_skipped_episodes_are_counted(write_random, tmp_path):
    skipped = {str(episode): "cut" for episode in range(1, 50)}
    store = write_random(tmp_path / "store", [2] * 50, [True] + [False] * 49, skipped=skipped)
    assert store.coverage.endswith("episode 1 (cut), episode 2 (cut), episode 3 (cut) and 46 more")


def test_frames_are_found_by_their_row(partial_store):
    frame, episode = partial_store.frames_at(torch.arange(len(partial_store.values)))
    assert frame.tolist() == [*range(14, 23), *range(40, 48)]
    assert episode.tolist() == [1] * 9 + [3] * 8
    assert partial_store.num_tokens == 15


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
def test_small_tokens_are_joined_like_the_others(write_random, tmp_path, storage):
    exact, small = (
        write_random(tmp_path / kind, [5, 6], token_kind="continuous", storage_dtype=kind)
        for kind in ("float32", storage)
    )
    index = torch.arange(11)
    expected, window = exact.window(index, [-1, 0]), small.window(index, [-1, 0])
    assert window.dtype == torch.float32
    error = float((window - expected).abs().max())
    assert 0 < error <= small.provenance.max_error < 0.02
    assert torch.equal(window == 0, expected == 0)
    copy = pickle.loads(pickle.dumps(small))
    assert torch.equal(copy.window(index, [-1, 0]), window)
