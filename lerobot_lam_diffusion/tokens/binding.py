"""Bind a store to the dataset that it was made from.

Frame counts alone do not reveal an edited dataset: after `delete_episodes([0])`, index 0 is another frame.
If all of a camera's files are on this machine, `frames_digest` determines whether its frames are the store's.
If they are not (streaming, or only some of the episodes), or if the store predates that digest,
`dataset_digest` decides. It covers every episode's boundaries, the statistics of its actions, states and
images, and the video encoding, and it reads only `meta/episodes`.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lerobot_lam_diffusion.tokens.frames_digest import frames_digest
from lerobot_lam_diffusion.utils.errors import DatasetError, TokenStoreError, raise_problems

if TYPE_CHECKING:
    from lerobot_lam_diffusion.tokens.provenance import DatasetInfo
    from lerobot_lam_diffusion.tokens.store import TokenStore

logger = logging.getLogger(__name__)

BOUNDARIES = ("episode_index", "length", "dataset_from_index", "dataset_to_index")
STATISTICS = ("count", "min", "max", "mean", "std")
FEATURES = ("action", "observation.state")


def dataset_digest(meta: Any, camera_key: str) -> str:
    """SHA-256 of what distinguishes this dataset's frames from another's.

    Args:
        meta: `LeRobotDatasetMetadata`.
        camera_key: The LAM's camera; its statistics and its video encoding are included.

    Raises:
        UserError: the dataset has no `meta/episodes` files (LeRobot's v3 layout).
    """
    return _digests(meta, camera_key, video_info(meta, camera_key))[0]


def has_digest(meta: Any, camera_key: str, digest: str, video: Any = None) -> bool:
    """Whether `digest` matches this dataset's frames.

    Digests from older stores, which did not include the encoding, are accepted too.

    Args:
        video: How the camera's video is encoded; None: use what the dataset says.
    """
    return digest in _digests(meta, camera_key, video_info(meta, camera_key) if video is None else video)


def video_info(meta: Any, camera_key: str) -> Any:
    """How a camera's video is encoded, which `reencode_dataset` keeps up to date; None for images."""
    return meta.features.get(camera_key, {}).get("info")


def _digests(meta: Any, camera_key: str, video: Any) -> tuple[str, str]:
    """The digest with the video's encoding, and without it."""
    files = sorted((Path(meta.root) / "meta" / "episodes").rglob("*.parquet"))
    if not files:
        raise DatasetError(
            f"{meta.root} has no meta/episodes/*.parquet: not a LeRobot dataset v3. Convert older ones with "
            "python -m lerobot.scripts.convert_dataset_v21_to_v30"
        )
    wanted = [*BOUNDARIES]
    wanted += [f"stats/{feature}/{name}" for feature in (*FEATURES, camera_key) for name in STATISTICS]
    tables = [_numbers(file, wanted) for file in files]
    try:
        table = pa.concat_tables(tables, promote_options="permissive").sort_by("episode_index")
    except (pa.ArrowException, KeyError) as error:
        raise DatasetError(
            f"the columns of {files[0].parent} and of the other files in {meta.root}/meta/episodes do not "
            f"fit together ({error}); restore the dataset"
        ) from error
    columns = [name for name in wanted if name in table.column_names]
    digest = hashlib.sha256()
    for name in columns:
        values = _flat(table[name].combine_chunks())
        digest.update(f"{name}:{len(values)}:".encode())
        digest.update(values.astype("<f8").tobytes())
    frames = digest.hexdigest()
    encoding = {k: v for k, v in video.items() if k.startswith("video.")} if isinstance(video, dict) else {}
    if encoding:
        digest.update(f"encoding:{json.dumps(encoding, sort_keys=True, default=str)}".encode())
    return digest.hexdigest(), frames


def _numbers(file: Path, wanted: list[str]) -> pa.Table:
    """The wanted columns that the file has, cast to float64 or lists of float64."""
    parquet = pq.ParquetFile(file)
    table = parquet.read(columns=[name for name in wanted if name in set(parquet.schema_arrow.names)])
    return pa.table({name: table[name].cast(_as_float64(table[name].type)) for name in table.column_names})


def _as_float64(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.large_list(_as_float64(kind.value_type))
    return pa.float64()


def _flat(column: pa.Array) -> np.ndarray:
    """A column of numbers or (nested) lists of numbers as one flat array."""
    while pa.types.is_large_list(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False)


def same_frames(meta: Any, camera_key: str, source: "DatasetInfo") -> bool | None:
    """Whether a camera's frames are those of `source`; None where the files that would tell are not here."""
    here = frames_digest(meta, camera_key) if source.frames and camera_key in meta.camera_keys else None
    return None if here is None else here == source.frames


def check_binding(store: "TokenStore", meta: Any) -> None:
    """Refuse a store that was made from frames other than the dataset's.

    A `.pt` file says nothing about its frames except their number, which was checked when it was opened.

    Raises:
        TokenStoreError: lists every difference.
    """
    if store.provenance is None:
        return
    source = store.provenance.dataset
    counts = {
        "frames": (source.total_frames, meta.total_frames),
        "episodes": (source.total_episodes, meta.total_episodes),
        "fps": (source.fps, meta.fps),
    }
    problems = [
        f"it has {have} {name}, the dataset {want}" for name, (have, want) in counts.items() if have != want
    ]
    camera = store.provenance.camera_key
    if camera not in meta.camera_keys:
        problems.append(f"its camera {camera!r} is not among the dataset's cameras {list(meta.camera_keys)}")
    elif not problems and not _is_of(store, meta):
        problems.append(
            "the dataset's episodes differ from those that the tokens were made of (edited, re-recorded, "
            "video encoded again, or another dataset with as many frames)"
        )
    raise_problems(
        f"token store {store.name} (made of {source.repo_id!r}) does not belong to dataset "
        f"{meta.repo_id!r} at {meta.root}; name the dataset that it was made of, or extract this one's "
        "tokens with lerobot-lam-precompute",
        problems,
        TokenStoreError,
    )


def _is_of(store: "TokenStore", meta: Any) -> bool:
    """Whether the dataset's frames are the store's, as far as this machine can tell."""
    assert store.provenance is not None
    camera, source = store.provenance.camera_key, store.provenance.dataset
    same = same_frames(meta, camera, source)
    if same is not None:
        return same
    known = has_digest(meta, camera, source.digest)
    if known and not source.frames and store.name not in _warned:
        _warned.add(store.name)
        logger.warning(
            "Token store %s is bound to its dataset by lengths and statistics only, for it was made before "
            "the frames themselves were compared. Check it with lerobot-lam-tokens verify, or extract the "
            "tokens again with lerobot-lam-precompute.",
            store.name,
        )
    return known


_warned: set[str] = set()
