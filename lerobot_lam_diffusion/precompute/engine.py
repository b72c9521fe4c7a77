"""Dataset → store: plan, extract this process's shards, merge; and what it tells at its end.

    output_dir.shards/   plan.json, then a finished shard after the other     (plan, shards)
    output_dir/          the store, once all shards are there                  (merge)

Finished shards outlive any crash: the same command goes on with what is missing.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lerobot_lam_diffusion.precompute.collect import ShardCollector, SkippedEpisode
from lerobot_lam_diffusion.precompute.dataset import check_dataset
from lerobot_lam_diffusion.precompute.encode import PairEncoder, find_batch_size
from lerobot_lam_diffusion.precompute.extend import KnownEpisodes
from lerobot_lam_diffusion.precompute.frames import EpisodeFrames, decoder_of
from lerobot_lam_diffusion.precompute.merge import Extraction, merge_shards, remove_shards
from lerobot_lam_diffusion.precompute.origin import codebook_of, episode_bounds, provenance_of
from lerobot_lam_diffusion.precompute.pipeline import Clock, extract
from lerobot_lam_diffusion.precompute.plan import Plan, differences, episodes_differ, identity_of, share_of
from lerobot_lam_diffusion.precompute.processes import Process
from lerobot_lam_diffusion.precompute.shards import ShardFolder
from lerobot_lam_diffusion.problems import UserError, raise_problems
from lerobot_lam_diffusion.tokens.episode_hashes import differing_episodes, episode_hashes
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, unfinished_folder
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.writer import refuse_existing

logger = logging.getLogger(__name__)

MOST_WORKERS = 16


@dataclass(frozen=True)
class Summary:
    """What an extraction made.

    Attributes:
        store: The finished store; None while shards of other processes are missing.
        frames, episodes: Covered by it; `missing`: frames without a token, at episode starts.
        code_usage: Per slot, the perplexity of its codes' use (1: one code, K: all alike); VQ only.
        num_bytes: Of the store on disk.
        encoded: Pairs that this process encoded; the others were there already, or another's.
        copied: Episodes whose tokens this process took from an older store.
        seconds: Of this run's extraction.
        spent: The same by what it was spent on; "decode" and "resize" add up over the worker threads.
        batch_size: Pairs that the LAM saw at a time; 0 if it saw none.
        shards_finished, shards_total: By all processes and runs so far.
    """

    store: TokenStore | None
    frames: int = 0
    episodes: int = 0
    missing: int = 0
    code_usage: list[float] = field(default_factory=list)
    num_bytes: int = 0
    encoded: int = 0
    copied: int = 0
    seconds: float = 0.0
    spent: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 0
    shards_finished: int = 0
    shards_total: int = 0


def precompute_tokens(
    dataset: Any,
    lam: Any,
    output_dir: Path,
    *,
    camera_key: str,
    lam_path: str,
    frame_stride: int = 1,
    use_vq_tokens: bool = True,
    storage_dtype: str = "",
    batch_size: int | None = None,
    num_workers: int | None = None,
    compile: bool = False,
    shard_frames: int | None = None,
    skip_unreadable: bool = False,
    unreadable: Mapping[int, str] | None = None,
    video_backend: str | None = None,
    process: Process | None = None,
    extend: Sequence[TokenStore] = (),
    merge: bool = True,
    show_progress: bool = True,
) -> Summary:
    """Encode every frame pair of a dataset (or of the episodes it was opened with) into a token store.

    What an earlier run of the same extraction finished is not done again. Neither batch size, nor workers,
    shards or processes change a float32 VQ token; others they change by rounding.

    Args:
        dataset: `LeRobotDataset`.
        lam: What `load_lam` returns.
        output_dir: Where the store will stand; it appears whole or not at all.
        camera_key: The dataset's camera that the LAM looks at.
        lam_path: How the user named the LAM; recorded.
        frame_stride: Gap of a pair, in frames.
        use_vq_tokens: VQ or continuous tokens.
        storage_dtype: How continuous tokens are kept: float32 (if empty), float16, bfloat16 or int8.
        batch_size: Pairs at a time; None: found out.
        num_workers: Threads that decode; None: the machine's cores, 16 at most. 0: decode and encode in turn.
        compile: Compile the LAM's encoder for that batch size.
        shard_frames: Frames of a shard at least; None: 1/256 of all, 512 to 65,536.
        skip_unreadable: Record an episode that cannot be read as missing instead of stopping.
        unreadable: Episodes to be recorded as missing, which `dataset` was opened without → why.
        video_backend: "torchcodec" or "pyav"; the dataset's own if None.
        process: Which part of the work is this process's; None: all.
        extend: Stores of other versions of the dataset: an episode of which one holds the tokens, made in the
            same way of the very same frames, is copied and not encoded again.
        merge: Make the store once all shards are there.
        show_progress: Draw a progress bar.

    Raises:
        FileExistsError: `output_dir` exists and is not the store of this very extraction.
        UserError: unfinished work of another extraction lies there (every difference is listed), the dataset
            contradicts itself, or an episode cannot be read.
    """
    started = time.perf_counter()
    unreadable = unreadable or {}
    check_dataset(dataset)
    extraction = _extraction(
        dataset,
        lam,
        camera_key,
        lam_path,
        frame_stride,
        use_vq_tokens,
        storage_dtype,
        video_backend,
        shard_frames,
        unreadable,
    )
    if (output_dir / PROVENANCE_FILE).is_file():
        return _summary(_same_store(output_dir, extraction))
    known = KnownEpisodes(extend, extraction.provenance)
    refuse_existing(output_dir)
    process = process or Process()
    folder = unfinished_folder(output_dir)
    clock, encoded, store = Clock(), 0, None
    try:
        extraction, present = process.agreed(lambda: _begin(extraction, output_dir))
        if present is None:
            raise FileExistsError(output_dir)
        plan, shards = extraction.plan, extraction.shards(folder)
        mine = _shards_to_make(shards, present, process)
        if mine:
            positions = [position for shard in mine for position in range(*plan.shards[shard])]
            readable = [position for position in positions if plan.episodes[position] not in unreadable]
            copied = known.positions(readable, plan, extraction.episode_hash)
            readable = [position for position in readable if position not in copied]
            if copied:
                logger.info("%d of %d episodes are copied from older stores.", len(copied), len(positions))
            frames = EpisodeFrames(dataset, camera_key, video_backend)
            frames.check((plan.episodes[position] for position in readable), skip_unreadable)
            num_frames = sum(plan.lengths[position] for position in readable)
            batch_size = batch_size or find_batch_size(lam, num_frames)
            if compile:
                lam.compile()
            workers = min(process.cores, MOST_WORKERS) if num_workers is None else num_workers
            collector = ShardCollector(shards, mine, frame_stride)
            for position in positions:
                if plan.episodes[position] in unreadable:
                    collector.skip(SkippedEpisode(position, 0, unreadable[plan.episodes[position]]))
            for position, values in copied.items():
                collector.add(
                    plan.first_rows[position] + torch.arange(frame_stride, len(values)), values[frame_stride:]
                )
            hidden = not (show_progress and process.is_first)
            with tqdm(total=num_frames, unit="frame", desc="LAM tokens", disable=hidden) as bar:
                encoded = extract(
                    readable,
                    plan,
                    lambda: EpisodeFrames(dataset, camera_key, video_backend),
                    lam,
                    PairEncoder(lam, batch_size, use_vq_tokens),
                    collector,
                    frame_stride=frame_stride,
                    batch_size=batch_size,
                    num_workers=workers,
                    num_encoders=process.cores if lam.device.type == "cpu" and workers else 0,
                    skip_unreadable=skip_unreadable,
                    clock=clock,
                    advance=bar.update,
                )
        if merge and len(shards.present()) == len(plan.shards):
            with clock("merge"):
                store = merge_shards(extraction, folder, output_dir)
    except (FileNotFoundError, FileExistsError):
        if not (output_dir / PROVENANCE_FILE).is_file():
            raise
        return _summary(_same_store(output_dir, extraction))  # another launch of the same work was faster
    return _summary(
        store,
        encoded=encoded,
        seconds=time.perf_counter() - started,
        spent=dict(clock.seconds),
        batch_size=batch_size if mine and batch_size else 0,
        copied=len(copied) if mine else 0,
        shards_finished=len(shards.present()) if store is None else len(plan.shards),
        shards_total=len(plan.shards),
    )


def summary_of(output_dir: Path) -> Summary:
    """Of a finished store."""
    return _summary(TokenStore.open(output_dir))


def how_to_go_on(output_dir: Path) -> str | None:
    """What to tell whoever's extraction into `output_dir` stopped; None if nothing of it is left."""
    folder = unfinished_folder(output_dir)
    try:
        extraction = Extraction.read(folder)
    except UserError:
        return None
    shards = extraction.shards(folder)
    return (
        f"{len(shards.present())} of {len(extraction.plan.shards)} shards are safe in {folder}; "
        "run the same command again to go on"
    )


def _extraction(
    dataset: Any,
    lam: Any,
    camera_key: str,
    lam_path: str,
    frame_stride: int,
    use_vq_tokens: bool,
    storage_dtype: str,
    video_backend: str | None,
    shard_frames: int | None,
    unreadable: Mapping[int, str],
) -> Extraction:
    provenance = provenance_of(
        dataset.meta,
        lam,
        camera_key=camera_key,
        lam_path=lam_path,
        frame_stride=frame_stride,
        use_vq_tokens=use_vq_tokens,
        storage_dtype=storage_dtype,
        decoder=decoder_of(dataset.meta, camera_key, video_backend or dataset._video_backend),
    )
    start, stop, covered = _episode_table(dataset)
    covered[list(unreadable)] = True
    episodes = covered.nonzero().flatten().tolist()
    lengths = (stop - start)[covered].tolist()
    plan = Plan.make(identity_of(provenance), episodes, lengths, shard_frames)
    hashes = episode_hashes(dataset.meta, camera_key)
    return Extraction(provenance, codebook_of(lam), start, stop, hashes, plan)


def _episode_table(dataset: Any) -> tuple[Tensor, Tensor, Tensor]:
    """First frame, end and "is to be covered" of every episode of the dataset."""
    start, stop = episode_bounds(dataset.meta)
    covered = torch.ones(len(start), dtype=torch.bool)
    if dataset.episodes is not None:
        covered = torch.zeros(len(start), dtype=torch.bool)
        covered[dataset.episodes] = True
    return start, stop, covered


def _begin(extraction: Extraction, output_dir: Path) -> tuple[Extraction, list[int] | None]:
    """Settle the plan, and see which shards are there (None: another launch finished the store meanwhile).

    Nothing is read, since other processes wait.
    """
    folder = unfinished_folder(output_dir)
    extraction = extraction.settle(folder)
    if (output_dir / PROVENANCE_FILE).is_file():
        return extraction, None
    present = extraction.shards(folder).present()
    if present:
        total = len(extraction.plan.shards)
        logger.warning("Going on with %s: %d of %d shards are finished.", folder, len(present), total)
    return extraction, present


def _shards_to_make(shards: ShardFolder, present: list[int], process: Process) -> list[int]:
    """This process's part of those that are missing, and of those that are there but damaged."""
    sizes = shards.plan.shard_sizes()
    ours = share_of(sizes, range(len(sizes)), process.shard_index, process.num_shards)
    missing = share_of(sizes, sorted(set(ours) - set(present)), process.rank, process.world_size)
    to_check = share_of(sizes, sorted(set(ours) & set(present)), process.rank, process.world_size)
    return sorted({*missing, *to_check} - set(shards.finished(to_check)))


def _same_store(output_dir: Path, extraction: Extraction) -> TokenStore:
    """The finished store, if it is what this extraction would make."""
    store = TokenStore.open(output_dir)
    assert store.provenance is not None
    problems = differences(identity_of(extraction.provenance), identity_of(store.provenance))
    covered = torch.nonzero(store.episode_row >= 0).flatten().tolist()
    problems += episodes_differ(extraction.plan.episodes, [*covered, *store.skipped])
    changed = [] if problems else differing_episodes(extraction.episode_hash, store.episode_hash)
    if changed:
        problems.append(
            f"the frames of {len(changed)} episodes have changed since, the first is {changed[0]}"
        )
    raise_problems(
        f"{output_dir} holds a finished token store of other inputs; choose another --output_dir or remove "
        "it first",
        problems,
        StoreExistsError,
    )
    if store.skipped and not store.num_tokens:
        raise StoreExistsError(
            f"{output_dir} holds no tokens, every episode was skipped; repair the dataset's files, remove "
            f"{output_dir} and extract again"
        )
    logger.info("%s is finished already; nothing was extracted.", output_dir)
    remove_shards(unfinished_folder(output_dir))  # a run may have died before it tidied up
    return store


class StoreExistsError(UserError, FileExistsError):
    """A finished store of other inputs."""

    section = "extraction"


def _summary(store: TokenStore | None, **run: Any) -> Summary:
    if store is None:
        return Summary(None, **run)
    covered = store.episode_row >= 0
    lengths = (store.episode_to - store.episode_from)[covered]
    return Summary(
        store=store,
        frames=len(store.values),
        episodes=int(covered.sum()),
        missing=int(lengths.clamp(max=store.frame_stride).sum()),
        code_usage=store.code_perplexity(),
        num_bytes=sum(file.stat().st_size for file in store.path.iterdir()),
        **run,
    )
