"""Dataset → store: plan, extract this process's shards, merge; and the summary of a run.

    output_dir.shards/   the plan, then one finished shard after another     (shards)
    output_dir/          the store, once all shards are there                (merge)

Finished shards outlive any crash: the same command continues with what is missing.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lerobot_lam_diffusion.precompute.dataset import (
    check_dataset,
    codebook_of,
    dataset_info,
    describe_tokens,
)
from lerobot_lam_diffusion.precompute.encode import PairEncoder, find_batch_size
from lerobot_lam_diffusion.precompute.extend import known_episodes
from lerobot_lam_diffusion.precompute.frames import EpisodeFrames, backend_of, decoder_of
from lerobot_lam_diffusion.precompute.merge import merge_shards
from lerobot_lam_diffusion.precompute.pipeline import extract
from lerobot_lam_diffusion.precompute.processes import Process
from lerobot_lam_diffusion.precompute.shards import (
    Plan,
    ShardCollector,
    ShardError,
    ShardFolder,
    SkippedEpisode,
    cut_into_shards,
    refuse_another,
)
from lerobot_lam_diffusion.tokens.dataset_check import episode_bounds
from lerobot_lam_diffusion.tokens.episode_hashes import episode_hashes
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, unfinished_folder
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import UserError
from lerobot_lam_diffusion.utils.files import refuse_existing, remove_partial, remove_whole

logger = logging.getLogger(__name__)

MOST_WORKERS = 16


@dataclass(frozen=True)
class Summary:
    """What an extraction made.

    Attributes:
        store: The finished store; None while shards of other processes are missing.
        encoded: Pairs that this process encoded; the rest existed already or are another process's.
        copied: Episodes whose tokens this process took from an older store.
        seconds: Duration of this run's extraction.
        waited: Seconds of them in which the LAM waited for frames.
        batch_size: Pairs per LAM batch; 0 if it encoded none.
        shards_finished, shards_total: Shards finished by all processes and runs so far, and all shards.
    """

    store: TokenStore | None
    encoded: int = 0
    copied: int = 0
    seconds: float = 0.0
    waited: float = 0.0
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

    Shards that an earlier run of the same extraction finished are kept. Batch size, workers, shards and
    processes never change a float32 VQ token; continuous and bfloat16 tokens they change by rounding.

    Args:
        dataset: `LeRobotDataset`.
        lam: What `load_lam` returns.
        output_dir: Folder of the future store; it appears complete or not at all.
        camera_key: The dataset's camera that the LAM looks at.
        lam_path: The LAM as the user named it; recorded.
        frame_stride: Offset between the two frames of a pair.
        use_vq_tokens: VQ or continuous tokens.
        storage_dtype: How continuous tokens are stored: float32 (if empty), float16, bfloat16 or int8.
        batch_size: Pairs at a time; None: found by trial.
        num_workers: Threads that decode; None: the machine's cores, 16 at most. 0: decode and encode in turn.
        compile: Compile the LAM's encoder for that batch size.
        shard_frames: Minimum frames per shard; None: 1/256 of all frames, but 512 to 65,536.
        skip_unreadable: Record an episode that cannot be read as missing instead of stopping.
        unreadable: Episodes that `dataset` was opened without, to record as missing; maps each to the reason.
        video_backend: "torchcodec" or "pyav"; the dataset's own if None.
        process: This process's part of the work; None: all of it.
        extend: Stores of other versions of the dataset. If one of them holds an episode's tokens, made in the
            same way from exactly the same frames, these are copied instead of encoded again.
        merge: Make the store once all shards are finished.
        show_progress: Draw a progress bar.

    Raises:
        FileExistsError: `output_dir` exists and is not the store of this very extraction.
        UserError: unfinished work of another extraction exists there (every difference is listed), the
            dataset is inconsistent, or an episode cannot be read.
    """
    started = time.perf_counter()
    unreadable = unreadable or {}
    process = process or Process()
    check_dataset(dataset)
    start, stop = episode_bounds(dataset.meta)
    episodes = range(len(start)) if dataset.episodes is None else {*dataset.episodes, *unreadable}
    provenance = describe_tokens(
        dataset_info(dataset.meta, camera_key),
        lam,
        camera_key=camera_key,
        lam_path=lam_path,
        frame_stride=frame_stride,
        use_vq_tokens=use_vq_tokens,
        storage_dtype=storage_dtype,
        decoder=decoder_of(dataset.meta, camera_key, video_backend or backend_of(dataset)),
    )
    plan = Plan(
        provenance,
        codebook_of(lam),
        start,
        stop,
        episode_hashes(dataset.meta, camera_key),
        sorted(episodes),
        cut_into_shards([int(stop[episode] - start[episode]) for episode in sorted(episodes)], shard_frames),
    )
    if process.agreed(lambda: (output_dir / PROVENANCE_FILE).is_file()):
        return Summary(_same_store(output_dir, plan))
    known = known_episodes(extend, plan)
    encoded, waited, copied, store, finished, total = 0, 0.0, {}, None, 0, 0
    try:
        shards, present = process.agreed(lambda: _begin(plan, output_dir))
        plan = shards.plan
        ours = range(len(plan.shards))[process.shard_index :: process.num_shards]
        mine = sorted(set(ours) - set(present))[process.rank :: process.world_size]
        if mine:
            positions = [position for shard in mine for position in range(*plan.shards[shard])]
            readable = [position for position in positions if plan.episodes[position] not in unreadable]
            copied = {position: known[position] for position in readable if position in known}
            if copied:
                logger.info("%d of %d episodes are copied from older stores.", len(copied), len(positions))
            readable = [position for position in readable if position not in copied]
            # Problems that show without decoding come before the work.
            EpisodeFrames(dataset, camera_key, video_backend).check(
                (plan.episodes[position] for position in readable), skip_unreadable
            )
            num_frames = sum(plan.lengths[position] for position in readable)
            batch_size = batch_size or find_batch_size(lam, num_frames)
            if compile:
                lam.compile()
            workers = min(process.cores, MOST_WORKERS) if num_workers is None else num_workers
            collector = ShardCollector(shards, mine, copied)
            for position in positions:
                if plan.episodes[position] in unreadable:
                    collector.skip(SkippedEpisode(position, 0, unreadable[plan.episodes[position]]))
            hidden = not (show_progress and process.is_first)
            with tqdm(total=num_frames, unit="frame", desc="LAM tokens", disable=hidden) as bar:
                encoded, waited = extract(
                    readable,
                    plan,
                    lambda: EpisodeFrames(dataset, camera_key, video_backend),
                    PairEncoder(lam, batch_size, use_vq_tokens),
                    collector,
                    num_workers=workers,
                    num_encoders=process.cores if lam.device.type == "cpu" and workers else 0,
                    skip_unreadable=skip_unreadable,
                    advance=bar.update,
                )
        finished, total = shards.progress()
        if merge and finished == total:
            store = merge_shards(shards, output_dir)
        if merge and store is None and (output_dir / PROVENANCE_FILE).is_file():
            store = _same_store(output_dir, plan)  # another launch of the same work was faster
    except (FileNotFoundError, FileExistsError, ShardError):
        if not (output_dir / PROVENANCE_FILE).is_file():
            raise
        store = _same_store(output_dir, plan)
    return Summary(
        store,
        encoded=encoded,
        copied=len(copied),
        seconds=time.perf_counter() - started,
        waited=waited,
        batch_size=(batch_size or 0) if encoded else 0,
        shards_finished=finished,
        shards_total=total,
    )


def resume_hint(output_dir: Path) -> str | None:
    """What is left of a stopped extraction into `output_dir`, and how to resume it; None if nothing is."""
    folder = unfinished_folder(output_dir)
    try:
        finished, total = ShardFolder.open(folder).progress()
    except UserError:
        return None
    return f"{finished} of {total} shards are safe in {folder}; run the same command again to go on"


def _begin(plan: Plan, output_dir: Path) -> tuple[ShardFolder, list[int]]:
    """Agree on the plan, and list the finished shards."""
    if not (output_dir / PROVENANCE_FILE).is_file():
        refuse_existing(output_dir)
    shards = ShardFolder.begin(unfinished_folder(output_dir), plan)
    present = shards.present()
    if present:
        total = len(shards.plan.shards)
        logger.warning("Resuming %s: %d of %d shards are finished.", shards.path, len(present), total)
    return shards, present


def _same_store(output_dir: Path, plan: Plan) -> TokenStore:
    """The finished store, if it is what this plan would make."""
    store = TokenStore.open(output_dir)
    assert store.provenance is not None
    refuse_another(
        f"{output_dir} holds a finished token store of other inputs; choose another --output_dir or remove "
        "it first",
        store.provenance,
        [*store.covered_episodes, *store.skipped],
        store.episode_hash,
        plan,
    )
    logger.info("%s is finished already; nothing was extracted.", output_dir)
    # A run may have died before it tidied up, or while it did.
    remove_whole(unfinished_folder(output_dir))
    remove_partial(unfinished_folder(output_dir))
    return store
