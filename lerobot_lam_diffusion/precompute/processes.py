"""This process's part of an extraction: under torchrun, `accelerate launch` or a job array, or all of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


@dataclass(frozen=True)
class Process:
    """This process among those that extract together.

    Attributes:
        rank, world_size: Within one launch, as Accelerate tells them.
        local_rank, local_size: Within one machine of that launch.
        shard_index, num_shards: The launch among launches that know nothing of each other (a SLURM array).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    shard_index: int = 0
    num_shards: int = 1

    @classmethod
    def launched(cls, device: str | None, shard_index: int = 0, num_shards: int = 1) -> "Process":
        """Ask Accelerate, if a launcher started several processes."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(shard_index=shard_index, num_shards=num_shards)
        state = PartialState(cpu=device == "cpu")
        return cls(
            rank=state.process_index,
            world_size=state.num_processes,
            local_rank=state.local_process_index,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            shard_index=shard_index,
            num_shards=num_shards,
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of its launch."""
        return self.rank == 0

    def agreed[T](self, decide: Callable[[], T]) -> T:
        """The first process's decision, broadcast to its launch; the only time that processes wait."""
        if self.world_size == 1:
            return decide()
        shared = [decide() if self.is_first else None]
        broadcast_object_list(shared)
        return shared[0]  # type: ignore[return-value]

    @property
    def cores(self) -> int:
        """Processor cores for this process."""
        return max(1, usable_cores() // self.local_size)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
