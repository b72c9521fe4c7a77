"""Open a dataset that is to be read from end to end; first say what of it is missing or contradicts itself.

LeRobot asks the Hub for whatever a dataset lacks. That is right for a dataset of the Hub; one that was
recorded or copied to a folder is refused by the name of the file.
"""

from pathlib import Path
from typing import Any

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import has_legacy_hub_download_metadata

from lerobot_lam_diffusion.precompute.merge import nothing_readable
from lerobot_lam_diffusion.problems import DatasetError
from lerobot_lam_diffusion.tokens.dataset_check import absent_files, check_metadata, refuse_absent

BLOCK_ROWS = 1 << 20


def is_local(root: str | Path | None) -> bool:
    """Whether the dataset was given as a folder that does not come from the Hub."""
    return root is not None and not has_legacy_hub_download_metadata(Path(root))


def open_whole(
    meta: Any,
    *,
    root: str | Path | None,
    revision: str | None = None,
    episodes: list[int] | None = None,
    video_backend: str | None = None,
    tolerance_s: float = 1e-4,
) -> LeRobotDataset:
    """A dataset, or some episodes of it, frames as uint8.

    Args:
        meta: Its `LeRobotDatasetMetadata`.
        root: As the user gave it; None: in LeRobot's home, or of the Hub.
        revision, episodes, video_backend, tolerance_s: As `LeRobotDataset` takes them.

    Raises:
        DatasetError: the metadata or the rows contradict themselves, or a file is missing and not to be had.
    """
    check_metadata(meta)
    absent = absent_files(meta, episodes)
    if is_local(root):
        refuse_absent(meta, absent)
    try:
        dataset = LeRobotDataset(
            meta.repo_id,
            root=root,
            episodes=episodes,
            revision=revision,
            video_backend=video_backend,
            tolerance_s=tolerance_s,
            return_uint8=True,
        )
    except Exception as error:  # `datasets` and the Hub's client have errors of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        refuse_absent(meta, absent, f", nor can it be fetched from the Hub ({reason})")
        raise DatasetError(
            f"dataset {meta.repo_id!r} at {meta.root} cannot be opened ({reason}); restore it"
        ) from error
    check_dataset(dataset)
    return dataset


def open_readable(
    meta: Any, *, episodes: list[int] | None = None, **options: Any
) -> tuple[LeRobotDataset, dict[int, str]]:
    """As `open_whole`, without the episodes whose files are not there.

    Returns:
        The dataset of the other episodes; and those episodes → why.

    Raises:
        UserError: as `open_whole`; or no episode is left.
    """
    check_metadata(meta)
    absent = absent_files(meta, episodes)
    if absent and not is_local(options.get("root")):
        try:
            return open_whole(meta, episodes=episodes, **options), {}
        except DatasetError:  # the Hub has not got them either
            absent = absent_files(meta, episodes)
    unreadable = {episode: what for what, needed_by in absent.items() for episode in needed_by}
    if unreadable:
        wanted = range(meta.total_episodes) if episodes is None else episodes
        episodes = [episode for episode in wanted if episode not in unreadable]
        if not episodes:
            raise nothing_readable(unreadable)
    return open_whole(meta, episodes=episodes, **options), unreadable


def check_dataset(dataset: Any) -> None:
    """Refuse metadata that contradict themselves, and data files whose rows are not the episodes' frames.

    LeRobot finds a frame by its row. Rows beyond the last episode, which an interrupted recording leaves,
    are never read.

    Args:
        dataset: `LeRobotDataset`, of all or some episodes.

    Raises:
        DatasetError: names the first row that is another frame.
    """
    meta, data = dataset.meta, dataset.hf_dataset.data
    check_metadata(meta)
    start, stop = (
        np.asarray(meta.episodes[f"dataset_{name}_index"], dtype=np.int64) for name in ("from", "to")
    )
    opened = np.arange(len(start)) if dataset.episodes is None else np.unique(dataset.episodes)
    ends = np.cumsum((stop - start)[opened])
    total = int(ends[-1])
    where = f"the data files of dataset {meta.repo_id!r} at {meta.root}"
    if len(data) < total or (dataset.episodes is not None and len(data) != total):
        raise DatasetError(
            f"{where} have {len(data)} rows, the episodes in meta/episodes {total}. Restore the dataset, or "
            "convert or record it again"
        )
    for first in range(0, total, BLOCK_ROWS):
        rows = np.arange(first, min(first + BLOCK_ROWS, total))
        place = np.searchsorted(ends, rows, side="right")
        episode = opened[place]
        index = rows - ends[place] + stop[episode]
        found_index, found_episode = (
            data.column(name).slice(first, len(rows)).to_numpy() for name in ("index", "episode_index")
        )
        wrong = (found_index != index) | (found_episode != episode)
        if wrong.any():
            at = int(wrong.argmax())
            raise DatasetError(
                f"row {rows[at]} of {where} is called frame {found_index[at]} (index) of episode "
                f"{found_episode[at]} (episode_index), by meta/episodes it is frame {index[at]} of episode "
                f"{episode[at]}. Restore the dataset, or convert or record it again"
            )
