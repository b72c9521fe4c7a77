"""Open a dataset to be read from end to end, check that it is complete, and describe its LAM tokens.

LeRobot asks the Hub for any file that a dataset lacks. That is right for a dataset from the Hub; one that was
recorded or copied to a folder is refused instead, with the name of the missing file.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import has_legacy_hub_download_metadata
from torch import Tensor

from lerobot_lam_diffusion.precompute.rows import rows_of
from lerobot_lam_diffusion.precompute.shards import nothing_readable
from lerobot_lam_diffusion.tokens.binding import dataset_digest
from lerobot_lam_diffusion.tokens.dataset_check import (
    absent_files,
    check_metadata,
    episode_bounds,
    refuse_absent,
    refuse_other_frames,
)
from lerobot_lam_diffusion.tokens.frames_digest import frames_digest
from lerobot_lam_diffusion.tokens.provenance import (
    CONTINUOUS,
    PACKAGE,
    UNKNOWN_DECODER,
    VQ,
    DatasetInfo,
    LamInfo,
    Provenance,
)
from lerobot_lam_diffusion.tokens.storage import storage_dtype_of
from lerobot_lam_diffusion.utils.errors import DatasetError, ExtractionError, first_line

BLOCK_ROWS = 1 << 20
_PACKAGE_OF = {"pyav": "av", "torchcodec": "torchcodec", "images": "pillow"}


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
    """Open a dataset, or some episodes of it, with frames as uint8.

    Args:
        meta: Its `LeRobotDatasetMetadata`.
        root: As the user gave it; None: in LeRobot's home, or of the Hub.
        revision, episodes, video_backend, tolerance_s: As `LeRobotDataset` takes them.

    Raises:
        DatasetError: the metadata or the rows contradict themselves, or a file is missing and cannot be
            fetched.
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
        refuse_absent(meta, absent, f", nor can it be fetched from the Hub ({first_line(error)})")
        raise DatasetError(
            f"dataset {meta.repo_id!r} at {meta.root} cannot be opened ({first_line(error)}); restore it"
        ) from error
    check_dataset(dataset)
    return dataset


def open_readable(
    meta: Any, *, episodes: list[int] | None = None, **options: Any
) -> tuple[LeRobotDataset, dict[int, str]]:
    """As `open_whole`, without the episodes whose files are missing.

    Returns:
        The dataset without these episodes, and a mapping from each of them to the reason.

    Raises:
        UserError: as `open_whole`; or no episode is left.
    """
    check_metadata(meta)
    absent = absent_files(meta, episodes)
    if absent and not is_local(options.get("root")):
        try:
            return open_whole(meta, episodes=episodes, **options), {}
        except DatasetError as error:
            if _is_unanswered(error):
                raise DatasetError(
                    f"{error}, or skip what is missing without asking the Hub: HF_HUB_OFFLINE=1"
                ) from error
            absent = absent_files(meta, episodes)
    unreadable = {episode: what for what, needed_by in absent.items() for episode in needed_by}
    if unreadable:
        wanted = range(meta.total_episodes) if episodes is None else episodes
        episodes = [episode for episode in wanted if episode not in unreadable]
        if not episodes:
            raise nothing_readable(unreadable)
    return open_whole(meta, episodes=episodes, **options), unreadable


def _is_unanswered(error: DatasetError) -> bool:
    """Whether the Hub may have what is missing: it was not reached, or refused. Offline it is not asked."""
    cause = error.__cause__ or error.__context__
    has_no_version = isinstance(cause, RuntimeError) and "codebase version" in str(cause)  # LeRobot's own
    answers = FileNotFoundError, RemoteEntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError
    is_answer = isinstance(cause, answers) and not isinstance(cause, LocalEntryNotFoundError | GatedRepoError)
    of_the_transport = isinstance(cause, OSError | RuntimeError | httpx.HTTPError)
    return of_the_transport and not (is_offline_mode() or has_no_version or is_answer)


def check_dataset(dataset: Any) -> None:
    """Refuse metadata that contradict themselves, and data files whose rows are not the episodes' frames.

    LeRobot finds a frame by its row. Rows beyond the last episode, which an interrupted recording leaves,
    are never read.

    Args:
        dataset: `LeRobotDataset`, of all or some episodes.

    Raises:
        DatasetError: names the first row that is another frame.
    """
    meta, rows = dataset.meta, rows_of(dataset)
    check_metadata(meta)
    start, stop = (bounds.numpy() for bounds in episode_bounds(meta))
    opened = np.arange(len(start)) if dataset.episodes is None else np.unique(dataset.episodes)
    ends = np.cumsum((stop - start)[opened])
    total = int(ends[-1])
    where = f"the data files of dataset {meta.repo_id!r} at {meta.root}"
    if len(rows) < total or (dataset.episodes is not None and len(rows) != total):
        raise DatasetError(
            f"{where} have {len(rows)} rows, the episodes in meta/episodes {total}. Restore the dataset, or "
            "convert or record it again"
        )
    for first in range(0, total, BLOCK_ROWS):
        row = np.arange(first, min(first + BLOCK_ROWS, total))
        position = np.searchsorted(ends, row, side="right")
        episode = opened[position]
        frame = row - ends[position] + stop[episode]
        refuse_other_frames(where, rows.slice(first, len(row)), frame, episode, first)


def dataset_info(meta: Any, camera_key: str) -> DatasetInfo:
    """What a store records of the dataset that it is made of."""
    return DatasetInfo(
        repo_id=meta.repo_id,
        revision=meta.revision,
        total_frames=meta.total_frames,
        total_episodes=meta.total_episodes,
        fps=meta.fps,
        digest=dataset_digest(meta, camera_key),
        frames=frames_digest(meta, camera_key) or "",
    )


def check_kind(num_codes: int, lam_path: str, use_vq_tokens: bool) -> None:
    """Refuse VQ tokens if the LAM has no codebook.

    Raises:
        ExtractionError: VQ tokens are wanted from a LAM without a codebook.
    """
    if use_vq_tokens and not num_codes:
        raise ExtractionError(
            f"the LAM {lam_path} has no codebook, so it makes no VQ tokens: extract continuous ones by "
            "--use_vq_tokens=false"
        )


def describe_tokens(
    dataset: DatasetInfo,
    lam: Any,
    *,
    camera_key: str,
    lam_path: str,
    frame_stride: int,
    use_vq_tokens: bool,
    storage_dtype: str = "",
    decoder: str = UNKNOWN_DECODER,
) -> Provenance:
    """The provenance of the tokens that `lam` makes of a dataset, before there are any.

    Args:
        dataset: See `dataset_info`.
        lam: What `load_lam` returns, on the device where it will run.
        camera_key: The dataset's name for the camera that the LAM looks at.
        lam_path: The LAM as the user named it.
        frame_stride: Offset between the two frames of a pair.
        use_vq_tokens: VQ or continuous tokens; a LAM without a codebook has only the latter.
        storage_dtype: How continuous tokens are stored; empty: float32.
        decoder: How files are decoded to pixels; see `Provenance`.

    Raises:
        ExtractionError: see `check_kind`.
    """
    check_kind(lam.num_codes, lam_path, use_vq_tokens)
    kind = VQ if use_vq_tokens else CONTINUOUS
    versions = {
        name: importlib.metadata.version(name) for name in (PACKAGE, "lerobot", "torch", "safetensors")
    }
    return Provenance(
        dataset=dataset,
        lam=LamInfo(
            path=lam_path,
            revision=lam.revision,
            fingerprint=lam.fingerprint,
            num_learned_tokens=lam.num_learned_tokens,
            action_latent_dim=lam.action_latent_dim,
            num_codes=lam.num_codes,
            token_scale=lam.token_scale,
        ),
        camera_key=camera_key,
        frame_stride=frame_stride,
        stride_seconds=frame_stride / dataset.fps,
        token_kind=kind,
        dtype=str(lam.dtype).removeprefix("torch."),
        versions=versions | decoder_version(decoder),
        storage_dtype=storage_dtype_of(kind, storage_dtype, lam.num_codes),
        device=lam.device.type,
        decoder=decoder,
    )


def decoder_version(decoder: str) -> dict[str, str]:
    """The package behind a decoder and its version; empty for an unknown one."""
    package = _PACKAGE_OF.get(decoder)
    return {} if package is None else {package: importlib.metadata.version(package)}


def codebook_of(lam: Any) -> Tensor:
    """float32 `(K, a)` on the CPU; empty for a LAM without a codebook."""
    return torch.empty(0) if lam.codebook is None else lam.codebook.cpu()
