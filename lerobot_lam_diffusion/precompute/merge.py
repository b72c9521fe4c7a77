"""Merge: the finished shards of an extraction become its store."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lerobot_lam_diffusion.precompute.files import write_atomically
from lerobot_lam_diffusion.precompute.plan import PLAN_FILE, Plan, PlanError
from lerobot_lam_diffusion.precompute.shards import ShardFolder
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, unfinished_folder
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.storage import index_dtype
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.writer import remove_partial, write_store

TABLES_FILE = "tables.safetensors"
LOCK_FILE = ".merge.lock"


@dataclass(frozen=True)
class Extraction:
    """All that an extraction's folder says besides its shards, so that it can be merged where it lies.

    Attributes:
        provenance: Of the store to be; hash, error and skipped episodes are still open.
        codebook: float32 `(K, a)`.
        episode_from, episode_to: int64 `(E,)`, of all the dataset's episodes.
        plan: Its shards.
    """

    provenance: Provenance
    codebook: Tensor
    episode_from: Tensor
    episode_to: Tensor
    plan: Plan

    def settle(self, folder: Path) -> "Extraction":
        """Leave this in `folder`, or go on with what lies there; see `Plan.settle`."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN_FILE).exists():
            tables = {"codebook": self.codebook, "from": self.episode_from, "to": self.episode_to}
            write_atomically(folder / TABLES_FILE, save({k: t.contiguous() for k, t in tables.items()}))
            write_atomically(folder / PROVENANCE_FILE, self.provenance.to_json().encode())
        return replace(self, plan=self.plan.settle(folder))

    @classmethod
    def read(cls, folder: Path) -> "Extraction":
        """Of an extraction that was begun.

        Raises:
            UserError: there is none, or it is damaged.
        """
        plan = Plan.read(folder / PLAN_FILE)
        provenance = Provenance.read(folder / PROVENANCE_FILE)
        try:
            with safe_open(folder / TABLES_FILE, framework="pt") as file:
                codebook, start, stop = (file.get_tensor(name) for name in ("codebook", "from", "to"))
        except (SafetensorError, OSError, ValueError) as error:
            raise PlanError(
                f"{folder / TABLES_FILE} is damaged ({error}). Run the extraction's command again: it goes "
                "on with its finished shards"
            ) from error
        return cls(provenance, codebook, start, stop, plan)

    def shards(self, folder: Path) -> ShardFolder:
        lam = self.provenance.lam
        if self.provenance.token_kind == VQ:
            return ShardFolder(folder, self.plan, (lam.num_learned_tokens,), index_dtype(lam.num_codes))
        width = lam.num_learned_tokens * lam.action_latent_dim
        return ShardFolder(folder, self.plan, (width,), torch.float32)


def merge_shards(extraction: Extraction, folder: Path, output_dir: Path) -> TokenStore | None:
    """Make the store of an extraction whose shards are all finished, and remove them.

    One process does it: whichever comes first. It may be interrupted at any time.

    Args:
        folder: Of the shards.
        output_dir: Where the store will stand.

    Returns:
        The store; None: another process is at it.

    Raises:
        ShardError: a shard is damaged; extract again, which makes that shard anew.
        OSError: the disk is full or not writable.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except FileNotFoundError:  # merged and removed already
        return TokenStore.open(output_dir)
    try:
        if (output_dir / PROVENANCE_FILE).is_file():
            store = TokenStore.open(output_dir)
        else:
            remove_partial(output_dir)
            store = _write(extraction, extraction.shards(folder), output_dir)
        shutil.rmtree(folder, ignore_errors=True)
        return store
    finally:
        lock.release()


def merge_unfinished(output_dir: Path) -> TokenStore:
    """Make the store `output_dir` of the shards that lie beside it, without dataset or LAM.

    Raises:
        UserError: there are none, some are missing or damaged, or another process is at it.
    """
    folder = unfinished_folder(output_dir)
    if not folder.is_dir():
        raise PlanError(
            f"nothing to merge at {output_dir}: there are no shards in {folder}. Name the --output_dir of an "
            "extraction, or several stores"
        )
    extraction = Extraction.read(folder)
    finished, total = extraction.shards(folder).count_finished(), len(extraction.plan.shards)
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
        skipped |= shards.check(shard)
    covered = torch.zeros(len(extraction.episode_from), dtype=torch.bool)
    covered[plan.episodes] = True
    covered[list(skipped)] = False
    reasons = {str(episode): skipped[episode] for episode in sorted(skipped)}
    return write_store(
        output_dir,
        replace(extraction.provenance, skipped=reasons),
        _rows(plan, shards, covered.tolist()),
        extraction.codebook,
        extraction.episode_from,
        extraction.episode_to,
        covered,
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
