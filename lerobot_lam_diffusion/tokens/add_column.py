"""Add the tokens of a store to a LeRobot dataset as one more column.

LeRobot's own `add_features` does this too, but it copies every video, turns every number into a Python
object, drops the row groups by which episodes are found, computes no statistics for the new feature, and
reads the whole result back into the cache of `datasets`. None of that is needed here: a new column changes
no video and leaves the other columns as they are. So the data files are extended as Arrow tables and written
with the functions that LeRobot's recorder itself uses, as are info, statistics and row groups; videos are
linked.

The statistics equal those that `recompute_stats` would compute (over all rows, with missing tokens counted as
zeros). As for a recorded feature, they are written to `meta/stats.json` and, per episode, to `meta/episodes`,
where `delete_episodes` and `split_dataset` read them.
"""

import json
import logging
import os
import re
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lerobot.datasets.compute_stats import aggregate_stats, compute_episode_stats
from lerobot.datasets.feature_utils import get_hf_features_from_features
from lerobot.datasets.io_utils import (
    load_stats,
    write_info,
    write_stats,
    write_table_one_row_group_per_episode,
)
from lerobot.datasets.utils import EPISODES_DIR, INFO_PATH, STATS_PATH
from lerobot.utils.constants import OBS_ENV_STATE, OBS_PREFIX, OBS_STATE

from lerobot_lam_diffusion.constants import OBS_LAM_TOKENS
from lerobot_lam_diffusion.tokens.binding import check_binding
from lerobot_lam_diffusion.tokens.column import ORIGINS_FILE, column_info, origin_document, read_origins
from lerobot_lam_diffusion.tokens.dataset_check import absent_files, read_frames, refuse_absent, video_files
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import DatasetError, raise_problems
from lerobot_lam_diffusion.utils.files import refuse_existing, spread_mode, whole_or_nothing

logger = logging.getLogger(__name__)

HUGGINGFACE = b"huggingface"
"""Key of a parquet file's metadata under which `datasets` keeps the types of the columns."""

Stats = dict[str, np.ndarray]


@dataclass(frozen=True)
class NewDataset:
    """A dataset that was written.

    Attributes:
        root: Its folder.
        linked: Video files shared with the original dataset.
        copied: Video files that were copied.
    """

    root: Path
    linked: int
    copied: int


def add_column(
    store: TokenStore,
    meta: Any,
    output: Path,
    key: str = OBS_LAM_TOKENS,
    copy_videos: bool = False,
) -> NewDataset:
    """Write the dataset `meta` with the tokens of `store` as column `key`, atomically.

    Args:
        store: Must cover all episodes of that dataset.
        meta: `LeRobotDatasetMetadata`; its data and videos are on this machine.
        output: Root of the new dataset; must not exist or must be empty.
        key: A name that LeRobot treats as an observation.
        copy_videos: Copy the videos. If False, hard-link them where the file system supports it. A linked
            file is one file: writing to it in place changes both datasets. LeRobot's `reencode_dataset` does
            so if the temporary folder is on another file system; its other tools write new files.

    Raises:
        UserError: the store is partial or not a store, the name cannot be used, or files are missing.
        TokenStoreError: the store was made from another dataset.
        FileExistsError: see `refuse_existing`.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    refuse_existing(output)
    check_binding(store, meta)
    raise_problems(
        f"the tokens of {store.name} cannot become a column", _problems(store, meta, key), DatasetError
    )
    refuse_absent(meta, absent_files(meta))
    with whole_or_nothing(output) as partial:
        partial.mkdir()
        _write_dataset(store, meta, partial, key)
        linked, copied = _bring_videos(meta, partial, copy_videos)
    return NewDataset(output.resolve(), linked, copied)


def _problems(store: TokenStore, meta: Any, key: str) -> list[str]:
    problems = []
    if store.provenance is None:
        problems.append(
            "it says nothing of the LAM, camera and dataset that it was made of; extract the tokens with "
            "lerobot-lam-precompute"
        )
    elif store.missing_episodes:
        problems.append(
            f"it is partial ({store.coverage}), and a column has a row for every frame; extract the missing "
            "episodes with lerobot-lam-precompute first"
        )
    if key in meta.features:
        problems.append(
            f"dataset {meta.repo_id!r} has a column {key!r} already; remove it with lerobot-edit-dataset "
            "--operation.type=remove_feature, or name another --column"
        )
    elif not re.fullmatch(rf"{re.escape(OBS_PREFIX)}[A-Za-z0-9_.-]+", key):
        problems.append(
            f"--column={key!r} must be '{OBS_PREFIX}' and letters, digits, '_', '-' or '.': LeRobot gives "
            "other keys no observation window, and allows no '/'"
        )
    elif "image" in key or key in (OBS_STATE, OBS_ENV_STATE):
        problems.append(
            f"--column={key!r} is a name by which LeRobot knows cameras or states; choose another"
        )
    return problems


def _write_dataset(store: TokenStore, meta: Any, root: Path, key: str) -> None:
    """All but the videos."""
    assert store.provenance is not None
    info = deepcopy(meta.info)
    info.features[key] = {
        "dtype": "float32",
        "shape": (store.token_dim,),
        "names": None,
        "info": column_info(store.provenance),
    }
    rewritten = [INFO_PATH, STATS_PATH, EPISODES_DIR, str(ORIGINS_FILE)]
    ignore = [Path(name).name for name in rewritten]
    shutil.copytree(
        meta.root / "meta",
        root / "meta",
        ignore=lambda folder, _: ignore if Path(folder) == meta.root / "meta" else [],
    )
    spread_mode(root)  # the original may be read-only
    stats = _write_data(store, meta, root, key, info.features)
    _write_episodes(meta, root, key, stats)
    write_info(info, root)
    total = aggregate_stats([{key: episode} for episode in stats.values()])
    write_stats({**(load_stats(meta.root) or {}), **total}, root)
    origins = {**read_origins(meta.root), key: origin_document(store.provenance, meta)}
    (root / ORIGINS_FILE).write_text(json.dumps(origins, indent=2) + "\n", encoding="utf-8")


def _write_data(store: TokenStore, meta: Any, root: Path, key: str, features: dict) -> dict[int, Stats]:
    """Write the data files with the column; the column's statistics for each episode."""
    arrow = get_hf_features_from_features(features).arrow_schema
    stats: dict[int, Stats] = {}
    for source, table, frames in read_frames(meta):
        tokens = np.zeros((len(table), store.token_dim), np.float32)  # of rows past the last episode: zeros
        tokens[: len(frames)] = store.window(torch.arange(frames.start, frames.stop), [0])[:, 0].numpy()
        column = pa.array(tokens.reshape(-1))
        if store.token_dim > 1:  # LeRobot keeps vectors of one number as numbers
            column = pa.FixedSizeListArray.from_arrays(column, type=arrow.field(key).type)
        table = table.append_column(arrow.field(key), column)
        known = table.schema.metadata or {}
        if HUGGINGFACE in known:  # what `datasets` reads the types from
            known = {**known, HUGGINGFACE: arrow.metadata[HUGGINGFACE]}
        target = root / source.relative_to(meta.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_table_one_row_group_per_episode(table.replace_schema_metadata(known), target)
        episodes = table["episode_index"].to_numpy()[: len(frames)]
        for episode in np.unique(episodes):
            rows = {key: tokens[: len(frames)][episodes == episode]}
            stats[int(episode)] = compute_episode_stats(rows, features)[key]
    return stats


def _write_episodes(meta: Any, root: Path, key: str, stats: dict[int, Stats]) -> None:
    """Write `meta/episodes` with the column's statistics."""
    for source in sorted((meta.root / EPISODES_DIR).glob("*/*.parquet")):
        table = pq.ParquetFile(source).read()
        of_rows = [stats[episode] for episode in table["episode_index"].to_pylist()]
        for name in of_rows[0]:
            column = pa.array([one[name].tolist() for one in of_rows])
            title = f"stats/{key}/{name}"
            if title in table.column_names:  # of a column of that name that was removed
                table = table.drop_columns([title])
            table = table.append_column(title, column)
        target = root / source.relative_to(meta.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, target, compression="snappy", use_dictionary=True)


def _bring_videos(meta: Any, root: Path, copy: bool) -> tuple[int, int]:
    """Link or copy the video files; how many of each."""
    linked = copied = 0
    for path in video_files(meta):
        # The Hub's cache consists of symbolic links, and os.link would link those.
        source, target = (meta.root / path).resolve(), root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not copy and _link(source, target):
            linked += 1
        else:
            shutil.copyfile(source, target)
            copied += 1
    return linked, copied


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:  # another file system, or one without links, or a file of somebody else
        logger.info("%s is copied, it cannot be linked: %s", source, error)
        return False
    return True
