"""Pair: full batches of frame pairs across chunk and episode boundaries."""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PairBatch:
    """Frame pairs and where their tokens belong.

    Attributes:
        prev, cur: uint8 `(B, 3, H, W)`, frames i - stride and i.
        rows: int64 `(B,)`, row of frame i among all frames to be extracted.
    """

    prev: Tensor
    cur: Tensor
    rows: Tensor


def episode_pairs(chunks: Iterable[Tensor], first_row: int, frame_stride: int) -> Iterator[PairBatch]:
    """All pairs (i - stride, i) of one episode, chunk by chunk; keeps only the last `frame_stride` frames.

    Args:
        chunks: The episode's frames in order, uint8 `(T, 3, H, W)` each.
        first_row: Row of the episode's first frame.
        frame_stride: Offset of a pair's frames.
    """
    recent: Tensor | None = None
    row = first_row + frame_stride
    for chunk in chunks:
        frames = chunk if recent is None else torch.cat([recent, chunk])
        count = len(frames) - frame_stride
        if count > 0:
            yield PairBatch(frames[:count], frames[frame_stride:], torch.arange(row, row + count))
            row += count
        recent = frames[-frame_stride:]


def rebatch(batches: Iterable[PairBatch], batch_size: int) -> Generator[PairBatch]:
    """The same pairs in the same order, `batch_size` at a time (fewer in the last)."""
    waiting: list[PairBatch] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch.rows)
        if count < batch_size:
            continue
        merged = _merge(waiting)
        rest = count - count % batch_size
        for start in range(0, rest, batch_size):
            yield _slice(merged, start, start + batch_size)
        waiting, count = [_slice(merged, rest, count)], count - rest
    if count:
        yield _merge(waiting)


def _merge(batches: list[PairBatch]) -> PairBatch:
    columns = zip(*((b.prev, b.cur, b.rows) for b in batches), strict=True)
    return PairBatch(*(torch.cat(column) for column in columns))


def _slice(batch: PairBatch, start: int, stop: int) -> PairBatch:
    return PairBatch(batch.prev[start:stop], batch.cur[start:stop], batch.rows[start:stop])
