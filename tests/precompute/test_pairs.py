"""Pairs: however frames are cut into chunks and batches, the same pairs, in order, each once."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from lerobot_lam_diffusion.precompute.pairs import PairBatch, episode_pairs, rebatch

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def numbered(start: int, stop: int) -> torch.Tensor:
    """Frames that can be told apart: frame i is filled with i."""
    return torch.arange(start, stop, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()


@st.composite
def chunked_episodes(draw):
    """Episode lengths, and each episode's frames cut into arbitrary chunks."""
    lengths = draw(LENGTHS)
    episodes, start = [], 0
    for length in lengths:
        cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
        bounds = [0, *cuts, length]
        episodes.append([numbered(start + a, start + b) for a, b in pairwise(bounds)])
        start += length
    return lengths, episodes


def expected_pairs(lengths: list[int], stride: int) -> list[tuple[int, int]]:
    pairs, start = [], 0
    for length in lengths:
        pairs += [(i - stride, i) for i in range(start + stride, start + length)]
        start += length
    return pairs


def all_pairs(lengths, episodes, stride):
    row = 0
    for length, chunks in zip(lengths, episodes, strict=True):
        yield from episode_pairs(iter(chunks), row, stride)
        row += length


def told(batches: list[PairBatch]) -> list[tuple[int, int]]:
    """(previous frame, frame) of all pairs; checks that a batch's rows are its frames."""
    pairs = []
    for batch in batches:
        assert batch.prev.shape == batch.cur.shape == (len(batch.rows), 3, 2, 2)
        assert batch.prev.dtype == batch.cur.dtype == torch.uint8
        assert batch.cur[:, 0, 0, 0].tolist() == batch.rows.tolist()
        pairs += zip(batch.prev[:, 2, 1, 1].tolist(), batch.cur[:, 2, 1, 1].tolist(), strict=True)
    return pairs


@given(chunked_episodes(), st.integers(1, 14))
def test_any_chunking_gives_every_pair_once_and_in_order(chunked, stride):
    lengths, episodes = chunked
    assert told(list(all_pairs(lengths, episodes, stride))) == expected_pairs(lengths, stride)


@given(chunked_episodes(), st.integers(1, 14), st.integers(1, 40))
def test_any_batch_size_gives_the_same_pairs_in_full_batches(chunked, stride, batch_size):
    lengths, episodes = chunked
    batches = list(rebatch(all_pairs(lengths, episodes, stride), batch_size))
    assert told(batches) == expected_pairs(lengths, stride)
    sizes = [len(batch.rows) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(0 < size <= batch_size for size in sizes)


def test_an_episode_not_longer_than_the_stride_gives_no_pair():
    assert list(episode_pairs([numbered(0, 2), numbered(2, 3)], 0, 3)) == []
    assert list(rebatch(episode_pairs([numbered(0, 3)], 0, 5), 2)) == []
    (batch,) = episode_pairs([numbered(0, 4)], 0, 3)
    assert told([batch]) == [(0, 3)]


def test_batches_are_ready_as_soon_as_they_are_full():
    """Memory stays bounded: nothing waits for the end of the episode."""
    read = []

    def chunks():
        for start in range(0, 100, 10):
            read.append(start)
            yield numbered(start, start + 10)

    first = next(rebatch(episode_pairs(chunks(), 0, 1), 4))
    assert told([first]) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert read == [0]
