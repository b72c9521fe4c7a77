"""Merge: the finished shards of an extraction become its store."""

import hashlib
import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lerobot_lam_diffusion.precompute.files import write_atomically
from lerobot_lam_diffusion.precompute.plan import PLAN_FILE, Plan, PlanError, identity_of
from lerobot_lam_diffusion.precompute.shards import ShardError, ShardFolder
from lerobot_lam_diffusion.problems import ExtractionError
from lerobot_lam_diffusion.tokens.episode_hashes import differing_episodes
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, sha256_of, unfinished_folder
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.storage import index_dtype
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.writer import remove_partial, write_store

LOCK_FILE = ".merge.lock"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """All that an extraction's folder says besides its shards, so that it can be merged where it lies.

    Attributes:
        provenance: Of the store to be; hash, error and skipped episodes are still open.
        codebook: float32 `(K, a)`.
        episode_from, episode_to: int64 `(E,)`, of all the dataset's episodes.
        episode_hash: uint8 `(E, 16)`, of their frames.
        plan: Its shards.
    """

    provenance: Provenance
    codebook: Tensor
    episode_from: Tensor
    episode_to: Tensor
    episode_hash: Tensor
    plan: Plan

    def settle(self, folder: Path) -> "Extraction":
        """Leave this in `folder`, or go on with what lies there; see `Plan.settle`."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN_FILE).exists():
            named = {
                "codebook": self.codebook,
                "from": self.episode_from,
                "to": self.episode_to,
                "hash": self.episode_hash,
            }
            tables = save({name: tensor.contiguous() for name, tensor in named.items()})
            digest = hashlib.sha256(tables).hexdigest()
            write_atomically(_tables_file(folder, digest), tables)  # other inputs, another name
            origin = {"provenance": json.loads(self.provenance.to_json()), "tables_sha256": digest}
            replace(self.plan, origin=origin).settle(folder)
        else:
            self.plan.settle(folder)
        there = Extraction.read(folder)
        changed = differing_episodes(self.episode_hash, there.episode_hash)
        if changed:
            raise PlanError(
                f"{folder} holds the unfinished work on other frames: episodes {_some(changed)} have changed "
                "since. Remove the folder and start again, or choose another --output_dir"
            )
        # Files that were missing or damaged when the work began may be whole now.
        dataset = replace(there.provenance.dataset, frames=self.provenance.dataset.frames)
        return replace(
            there, provenance=replace(there.provenance, dataset=dataset), episode_hash=self.episode_hash
        )

    @classmethod
    def read(cls, folder: Path) -> "Extraction":
        """Of an extraction that was begun.

        Raises:
            UserError: there is none, or it is damaged.
        """
        plan = Plan.read(folder / PLAN_FILE)
        provenance = Provenance.from_document(plan.origin.get("provenance"), str(folder / PLAN_FILE))
        if identity_of(provenance) != plan.identity:
            raise _damaged(folder / PLAN_FILE, "it contradicts itself")
        digest = plan.origin.get("tables_sha256")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise _damaged(folder / PLAN_FILE, "it does not name its tables")
        path = _tables_file(folder, digest)
        try:
            if sha256_of(path) != digest:
                raise ValueError("its SHA-256 is not the plan's")
            tables = load(path.read_bytes())
            codebook, start, stop, hashes = (tables[name] for name in ("codebook", "from", "to", "hash"))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise _damaged(path, str(error)) from error
        return cls(provenance, codebook, start, stop, hashes, plan)

    def shards(self, folder: Path) -> ShardFolder:
        lam = self.provenance.lam
        if self.provenance.token_kind == VQ:
            return ShardFolder(folder, self.plan, (lam.num_learned_tokens,), index_dtype(lam.num_codes))
        width = lam.num_learned_tokens * lam.action_latent_dim
        return ShardFolder(folder, self.plan, (width,), torch.float32)


def _some(episodes: Sequence[int]) -> str:
    return ", ".join(map(str, episodes[:5])) + (", …" if len(episodes) > 5 else "")


def _tables_file(folder: Path, digest: str) -> Path:
    return folder / f"tables-{digest[:16]}.safetensors"


def _damaged(path: Path, what: str) -> PlanError:
    return PlanError(
        f"{path} is damaged ({what}). Remove the folder {path.parent} and start again, or choose another "
        "--output_dir"
    )


def merge_shards(extraction: Extraction, folder: Path, output_dir: Path) -> TokenStore | None:
    """Make the store of an extraction whose shards are all finished, and remove them.

    One process does it: whichever comes first. It may be interrupted at any time.

    Args:
        folder: Of the shards.
        output_dir: Where the store will stand.

    Returns:
        The store; None: another process is at it.

    Raises:
        ExtractionError: every token was skipped; the shards are removed, so that the same command extracts
            them once the files are repaired.
        ShardError: a shard is damaged; extract again, which makes that shard anew.
        OSError: the disk is full or not writable.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s); merging all the same.", folder, error)
    try:
        if (output_dir / PROVENANCE_FILE).is_file():
            store = TokenStore.open(output_dir)
        else:
            if lock.is_locked:
                remove_partial(output_dir)
            store = _write(extraction, extraction.shards(folder), output_dir)
        remove_shards(folder)
        return store
    finally:
        lock.release()


def remove_shards(folder: Path) -> None:
    """Remove an extraction's folder, so that nobody sees half of it."""
    gone = folder.with_name(f".{folder.name}.gone-{secrets.token_hex(8)}")
    try:
        folder.rename(gone)
    except OSError:  # another process was faster, or there is none
        return
    shutil.rmtree(gone, ignore_errors=True)


def merge_unfinished(output_dir: Path) -> TokenStore:
    """Make the store `output_dir` of the shards that lie beside it, without dataset or LAM.

    Raises:
        UserError: there are none, some are missing or damaged, or another process is at it.
    """
    folder = unfinished_folder(output_dir)
    if (output_dir / PROVENANCE_FILE).is_file():
        return TokenStore.open(output_dir)  # merged already
    if not folder.is_dir():
        raise PlanError(
            f"nothing to merge at {output_dir}: there are no shards in {folder}. Name the --output_dir of an "
            "extraction, or several stores"
        )
    extraction = Extraction.read(folder)
    finished, total = len(extraction.shards(folder).present()), len(extraction.plan.shards)
    if finished < total:
        raise PlanError(
            f"{folder} has {finished} of {total} shards; run the extraction's command again to make the rest"
        )
    store = merge_shards(extraction, folder, output_dir)
    if store is None:
        raise PlanError(f"another process is merging {folder}; wait for it")
    return store


def _write(extraction: Extraction, shards: ShardFolder, output_dir: Path) -> TokenStore:
    plan = extraction.plan
    skipped: dict[int, str] = {}
    for shard in range(len(plan.shards)):
        try:
            skipped |= shards.check(shard)
        except ShardError as error:
            raise ShardError(
                f"{error}. Run the extraction's command again, of a job array the task that made this shard "
                "or one without --shard_index: it is made anew"
            ) from error
    covered = torch.zeros(len(extraction.episode_from), dtype=torch.bool)
    covered[plan.episodes] = True
    covered[list(skipped)] = False
    lengths = extraction.episode_to - extraction.episode_from
    if skipped and not bool((covered & (lengths > extraction.provenance.frame_stride)).any()):
        remove_shards(shards.path)  # else the next run would find its work done
        raise nothing_readable(skipped)
    reasons = {str(episode): skipped[episode] for episode in sorted(skipped)}
    return write_store(
        output_dir,
        replace(extraction.provenance, skipped=reasons),
        _rows(plan, shards, covered.tolist()),
        extraction.codebook,
        extraction.episode_from,
        extraction.episode_to,
        covered,
        extraction.episode_hash,
    )


def nothing_readable(skipped: dict[int, str]) -> ExtractionError:
    """Of an extraction that skipped every episode that has tokens."""
    first = min(skipped)
    return ExtractionError(
        f"no token was extracted, all {len(skipped)} episodes with tokens were skipped (episode {first}: "
        f"{skipped[first]}). There is no store; repair the files and run the same command again"
    )


def _rows(plan: Plan, shards: ShardFolder, covered: list[bool]) -> Iterator[Tensor]:
    """Rows of all covered episodes in order, a shard or an episode at a time."""
    first_rows = plan.first_rows
    for shard, (first, end) in enumerate(plan.shards):
        values = shards.values(shard)
        if all(covered[episode] for episode in plan.episodes[first:end]):
            yield values
            continue
        for position in range(first, end):
            if covered[plan.episodes[position]]:
                start = first_rows[position] - first_rows[first]
                yield values[start : start + plan.lengths[position]]
