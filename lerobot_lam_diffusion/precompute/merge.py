"""Merge: the finished shards of an extraction become its store."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from filelock import Timeout
from torch import Tensor

from lerobot_lam_diffusion.precompute.shards import ShardError, ShardFolder, nothing_readable
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, unfinished_folder
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.writer import write_store
from lerobot_lam_diffusion.utils.errors import ExtractionError, raise_problems
from lerobot_lam_diffusion.utils.files import locked, remove_partial, remove_whole

logger = logging.getLogger(__name__)

LOCK_FILE = ".merge.lock"


def merge_shards(shards: ShardFolder, output_dir: Path) -> TokenStore | None:
    """Make the store of an extraction whose shards are all finished, and remove them.

    One process does it: whichever comes first. It may be interrupted at any time.

    Args:
        output_dir: Where the store will stand.

    Returns:
        The store; None: another process is merging, or has merged.

    Raises:
        ExtractionError: every token was skipped; the shards are removed, so that the same command extracts
            them once the files are repaired.
        ShardError: shards were damaged, and are unfinished now; extract again.
        OSError: the disk is full or not writable.
    """
    with ExitStack() as stack:
        try:
            is_locked = stack.enter_context(locked(shards.path / LOCK_FILE, wait=False))
        except Timeout:
            return None
        except OSError:  # shards that another user made: they can be read, and moved away
            is_locked = False
        if not is_locked:
            logger.warning("%s cannot be locked; merging without a lock.", shards.path)
        if (output_dir / PROVENANCE_FILE).is_file():
            return None
        if is_locked:
            remove_partial(output_dir)
        store = _write(shards, output_dir)
        remove_whole(shards.path)
        return store


def merge_unfinished(output_dir: Path) -> TokenStore:
    """Make the store `output_dir` of the shards that lie beside it, without dataset or LAM.

    Raises:
        UserError: there are none, some are missing or damaged, or another process is merging.
    """
    folder = unfinished_folder(output_dir)
    if (output_dir / PROVENANCE_FILE).is_file():
        return TokenStore.open(output_dir)  # merged already
    if not folder.is_dir():
        raise ExtractionError(
            f"nothing to merge at {output_dir}: there are no shards in {folder}. Name the --output_dir of an "
            "extraction, or several stores"
        )
    shards = ShardFolder.open(folder)
    finished, total = shards.progress()
    if finished < total:
        raise ExtractionError(
            f"{folder} has {finished} of {total} shards; run the extraction's command again to make the rest"
        )
    store = merge_shards(shards, output_dir)
    if store is not None:
        return store
    if not (output_dir / PROVENANCE_FILE).is_file():
        raise ExtractionError(f"another process is merging {folder}; wait for it")
    return TokenStore.open(output_dir)


def _write(shards: ShardFolder, output_dir: Path) -> TokenStore:
    plan = shards.plan
    skipped: dict[int, str] = {}
    damaged = []
    for shard in range(len(plan.shards)):
        try:
            skipped |= shards.read(shard)[1]
        except ShardError as error:
            shards.discard(shard)
            damaged.append(str(error))
    raise_problems(
        f"{shards.path} had damaged shards, which are discarded",
        damaged,
        ShardError,
        "Run the extraction again, of a job array all tasks: it makes them anew",
    )
    covered = torch.zeros(len(plan.episode_from), dtype=torch.bool)
    covered[plan.episodes] = True
    covered[list(skipped)] = False
    lengths = plan.episode_to - plan.episode_from
    if skipped and not bool((covered & (lengths > plan.provenance.frame_stride)).any()):
        remove_whole(shards.path)  # else the next run would find its work done
        raise nothing_readable(skipped)
    reasons = {str(episode): skipped[episode] for episode in sorted(skipped)}
    return write_store(
        output_dir,
        replace(plan.provenance, skipped=reasons),
        _rows(shards, covered),
        plan.codebook,
        plan.episode_from,
        plan.episode_to,
        covered,
        plan.episode_hash,
    )


def _rows(shards: ShardFolder, covered: Tensor) -> Iterator[Tensor]:
    """Rows of the covered episodes in order, a shard at a time."""
    plan = shards.plan
    for shard, (first, end) in enumerate(plan.shards):
        lengths = torch.tensor(plan.lengths[first:end])
        yield shards.read(shard)[0][covered[plan.episodes[first:end]].repeat_interleave(lengths)]
