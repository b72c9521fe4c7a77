"""Collect: encoded rows, in whatever order they come, into shards; a full shard is written at once."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lerobot_lam_diffusion.precompute.shards import ShardFolder


@dataclass(frozen=True)
class SkippedEpisode:
    """An episode that could not be read to its end.

    Attributes:
        position: In the plan's `episodes`.
        pairs: That were read before it failed.
        reason: For people.
    """

    position: int
    pairs: int
    reason: str


@dataclass
class _Buffer:
    values: Tensor
    pending: int  # pairs that are still to come
    skipped: dict[int, str] = field(default_factory=dict)


class ShardCollector:
    """Rows of some shards of a plan.

    Args:
        folder: Where finished shards are written.
        shards: Those that this process makes.
        frame_stride: Rows less than that after their episode's start stay zero.
    """

    def __init__(self, folder: ShardFolder, shards: Sequence[int], frame_stride: int) -> None:
        self._folder = folder
        self._plan = folder.plan
        self._stride = frame_stride
        self._first_rows = self._plan.first_rows
        self._starts = [self._first_rows[first] for first, _ in self._plan.shards]
        self._buffers: dict[int, _Buffer] = {}
        for shard in shards:
            if self._pairs_of(shard) == 0:  # nothing will ever come for it
                self._write(shard, self._buffer(shard))

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Values `(B, …)` of `rows` int64 `(B,)`."""
        shard_of = torch.bucketize(rows, torch.tensor(self._starts), right=True) - 1
        for shard in shard_of.unique().tolist():
            here = shard_of == shard
            buffer = self._buffer(shard)
            buffer.values[rows[here] - self._starts[shard]] = values[here].to(buffer.values.dtype)
            self._count_down(shard, buffer, int(here.sum()))

    def skip(self, episode: SkippedEpisode) -> None:
        """Expect no more rows of an episode, and note why."""
        if not self._pairs_in(episode.position):
            return  # it has no tokens, readable or not
        first, reason = self._first_rows[episode.position], episode.reason
        shard = bisect_right(self._starts, first) - 1
        buffer = self._buffer(shard)
        buffer.skipped[self._plan.episodes[episode.position]] = reason
        self._count_down(shard, buffer, self._pairs_in(episode.position) - episode.pairs)

    def _buffer(self, shard: int) -> _Buffer:
        if shard not in self._buffers:
            shape = (self._plan.shard_sizes()[shard], *self._folder.values_shape)
            whole_numbers = not self._folder.values_dtype.is_floating_point
            values = torch.zeros(shape, dtype=torch.int32 if whole_numbers else torch.float32)
            self._buffers[shard] = _Buffer(values, self._pairs_of(shard))
        return self._buffers[shard]

    def _count_down(self, shard: int, buffer: _Buffer, pairs: int) -> None:
        buffer.pending -= pairs
        if buffer.pending == 0:
            self._write(shard, buffer)

    def _write(self, shard: int, buffer: _Buffer) -> None:
        self._folder.write(shard, buffer.values.to(self._folder.values_dtype), buffer.skipped)
        del self._buffers[shard]

    def _pairs_of(self, shard: int) -> int:
        first, end = self._plan.shards[shard]
        return sum(self._pairs_in(position) for position in range(first, end))

    def _pairs_in(self, position: int) -> int:
        return max(0, self._plan.lengths[position] - self._stride)
