"""Decode, move and encode at the same time: threads decode ahead, threads run batches through the LAM."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.lam.precision import full_precision
from lerobot_lam_diffusion.precompute.encode import PairEncoder
from lerobot_lam_diffusion.precompute.frames import DecodeError, EpisodeFrames
from lerobot_lam_diffusion.precompute.pairs import PairBatch, episode_pairs, rebatch
from lerobot_lam_diffusion.precompute.parallel import work_ahead
from lerobot_lam_diffusion.precompute.shards import Plan, ShardCollector, SkippedEpisode

CHUNKS_AHEAD = 2
"""Decoded chunks that may wait for the LAM, per worker."""


class ResizeOnDevice:
    """Brings chunks to the LAM's device and size, each frame once; on CUDA in parallel with the encoding."""

    def __init__(self, lam: Any) -> None:
        self._lam = lam
        self._stream = torch.cuda.Stream(lam.device) if lam.device.type == "cuda" else None

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 `(T, 3, H, W)` on the CPU → uint8 `(T, 3, R, R)` on the LAM's device."""
        if self._stream is None:
            return self._lam.resize(frames)
        with torch.cuda.stream(self._stream):
            small = self._lam.resize(frames.pin_memory())
        self._stream.synchronize()
        small.record_stream(torch.cuda.default_stream(self._lam.device))
        return small


def extract(
    positions: Sequence[int],
    plan: Plan,
    make_frames: Callable[[], EpisodeFrames],
    encoder: PairEncoder,
    collector: ShardCollector,
    *,
    num_workers: int,
    num_encoders: int,
    skip_unreadable: bool,
    advance: Callable[[int], object],
) -> tuple[int, float]:
    """Encode all pairs of some episodes and hand their values to `collector`.

    Args:
        positions: Positions of the episodes in the plan.
        make_frames: Creates the reader of one worker thread.
        num_workers: Decoding threads; 0: none, decoding alternates with encoding.
        num_encoders: Encoding threads; 0: only the calling thread, as a GPU needs. CPU cores achieve more as
            independent threads than within one operation, whose threads busy-wait for each other.
        skip_unreadable: Skip an episode that cannot be read instead of raising.
        advance: Called with the number of frames that were decoded.

    Returns:
        How many pairs were encoded, and for how many seconds the LAM waited for them.

    Raises:
        DecodeError: an episode cannot be read.
    """
    first_rows = plan.first_rows

    def make_worker() -> Callable[[int], Iterator[PairBatch | SkippedEpisode]]:
        frames, resize = make_frames(), ResizeOnDevice(encoder.lam)

        def small_chunks(position: int) -> Iterator[Tensor]:
            for chunk in frames.chunks(plan.episodes[position]):
                small = resize(chunk)
                advance(len(small))
                yield small

        def pairs_of(position: int) -> Iterator[PairBatch | SkippedEpisode]:
            done = 0
            try:
                for batch in episode_pairs(
                    small_chunks(position), first_rows[position], plan.provenance.frame_stride
                ):
                    done += len(batch.rows)
                    yield batch
            except DecodeError as error:
                if not skip_unreadable:
                    raise
                yield SkippedEpisode(position, done, str(error))

        return pairs_of

    skipped: deque[SkippedEpisode] = deque()
    waited = 0.0

    def readable() -> Iterator[PairBatch]:
        nonlocal waited
        while True:
            started = time.perf_counter()
            result = next(ahead, None)
            waited += time.perf_counter() - started
            if result is None:
                return
            if isinstance(result, SkippedEpisode):
                skipped.append(result)  # the collector is the main thread's
            else:
                yield result

    def encode(batch: PairBatch) -> Iterator[tuple[Tensor, Tensor]]:
        yield batch.rows, encoder(batch)

    ahead = work_ahead(positions, make_worker, num_workers, CHUNKS_AHEAD * max(1, num_workers))
    batches = rebatch(readable(), encoder.batch_size)
    encoded = 0
    results = work_ahead(batches, lambda: encode, num_encoders, max(1, num_encoders))
    # Set the precision once for all threads; on exit, the encoders stop before their inputs.
    with full_precision(encoder.lam.device), closing(ahead), closing(batches), closing(results):
        for rows, values in results:
            collector.add(rows, values)
            while skipped:
                collector.skip(skipped.popleft())
            encoded += len(rows)
    for episode in skipped:
        collector.skip(episode)
    return encoded, waited
