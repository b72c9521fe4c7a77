"""`--policy.lam_tokens_path=auto`: the policy's token store out of the cache, built first if it is missing.

The only place where a policy calls `precompute`; it is imported for `auto` alone, so that training on a store
that a path names imports no LAM.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.import_utils import get_safe_default_video_backend

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.lam import TokenShape, fingerprint_of, load_lam, proposed_stride, read_config
from lerobot_lam_diffusion.live_tokens import check_lams, find_lams
from lerobot_lam_diffusion.precompute.cache import CacheEntry, CacheKey, cached_entries
from lerobot_lam_diffusion.precompute.dataset import open_whole
from lerobot_lam_diffusion.precompute.engine import how_to_go_on, precompute_tokens
from lerobot_lam_diffusion.precompute.frames import DecodeError, decoder_of
from lerobot_lam_diffusion.problems import DatasetError, ExtractionError, UserError
from lerobot_lam_diffusion.token_source import dataset_camera
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.episode_hashes import are_known
from lerobot_lam_diffusion.tokens.frames_digest import frames_digest
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS, VQ

logger = logging.getLogger(__name__)


def resolved_lams(config: DiffusionLamConfig) -> tuple[list[str], list[TokenShape]]:
    """Fingerprint and token shape of each source's LAM, checked to fit `config` without loading weights."""
    folders = find_lams(config)
    fingerprints = [fingerprint_of(folder) for folder in folders]
    shapes = [read_config(folder) for folder in folders]
    check_lams(config, fingerprints, shapes)
    return fingerprints, shapes


def cached_stores(
    config: DiffusionLamConfig, dataset_meta: Any, names: Mapping[str, str] | None = None
) -> list[TokenStore]:
    """For each source of tokens the store of all of the dataset's tokens, as `config` wants them.

    Args:
        config: With `lam_model_path` and `lam_camera_key`; fields that contradict a LAM are refused before
            anything is built.
        dataset_meta: `LeRobotDatasetMetadata`, or None outside training.
        names: The policy's names of cameras → the dataset's, as far as they are known.

    Raises:
        UserError: no dataset, no such camera or LAM, contradicting fields, or an episode cannot be read.
    """
    if dataset_meta is None:
        raise ExtractionError(
            "--policy.lam_tokens_path=auto builds the tokens of a training dataset, and there is none: build "
            "the policy with LeRobot's make_policy(config, ds_meta=dataset.meta), or name a token store"
        )
    sources = config.token_sources
    cameras = [dataset_camera(config, str(source.camera_key), dataset_meta, names) for source in sources]
    fingerprints, shapes = resolved_lams(config)
    if config.lam_frame_stride is None:
        config.lam_frame_stride = _proposed_stride(shapes, float(dataset_meta.fps))
    video_backend = get_safe_default_video_backend()
    stores = []
    for source, camera_key, fingerprint in zip(sources, cameras, fingerprints, strict=True):
        key = CacheKey(
            dataset_digest=_identity(dataset_meta, camera_key, video_backend),
            total_frames=dataset_meta.total_frames,
            fps=float(dataset_meta.fps),
            lam_fingerprint=fingerprint,
            camera_key=camera_key,
            frame_stride=config.lam_frame_stride or 1,
            token_kind=VQ if config.lam_use_vq_tokens else CONTINUOUS,
            dtype=config.lam_dtype,
            decoder=decoder_of(dataset_meta, camera_key, video_backend),
            device=torch.device(str(config.device)).type,
        )
        build = partial(
            _build,
            key=key,
            lam_path=str(source.model_path),
            config=config,
            dataset_meta=dataset_meta,
            video_backend=video_backend,
        )
        stores.append(CacheEntry.of(key).open(dataset_meta, build))
    return stores


def _proposed_stride(lams: list[TokenShape], fps: float) -> int:
    """The stride where the user names none; told, since it decides what the tokens mean."""
    stride = proposed_stride(lams, fps)
    if stride is None:
        return 1
    logger.info(
        "lam_frame_stride is %d: the LAM was trained on pairs some %.2g s apart, and the dataset has %g fps.",
        stride, stride / fps, fps,
    )  # fmt: skip
    return stride


def _identity(dataset_meta: Any, camera_key: str, video_backend: str) -> str:
    """Digest of all of a camera's frames, which are fetched first if they are not all on this machine."""
    found = frames_digest(dataset_meta, camera_key)
    if found is None:
        _whole_dataset(dataset_meta, video_backend)
        found = frames_digest(dataset_meta, camera_key)
    if found is None:
        raise ExtractionError(
            f"--policy.lam_tokens_path=auto needs all episodes of {dataset_meta.repo_id!r}, and data or "
            f"video files of {camera_key} are missing in {dataset_meta.root}, or hold other than its "
            f"{dataset_meta.total_frames} frames; restore the dataset, or name a token store instead of auto"
        )
    return found


def _earlier_versions(key: CacheKey) -> list[TokenStore]:
    """Finished stores in the cache whose tokens were made in the same way, of other frames."""
    stores = []
    for entry in cached_entries():
        try:
            provenance = entry.provenance() if entry.is_finished else None
            if provenance is None or key.of_other_frames(provenance) != key:
                continue
            store = TokenStore.load(entry.folder)
        except (UserError, OSError):
            continue  # damaged, or removed meanwhile: nothing is taken from it
        if are_known(store.episode_hash).any():
            stores.append(store)
    return stores


def _build(
    folder: Path,
    key: CacheKey,
    lam_path: str,
    config: DiffusionLamConfig,
    dataset_meta: Any,
    video_backend: str,
) -> None:
    logger.info(
        "LAM tokens: building the store of all %d episodes of %s with %s of %s, once for all experiments, in "
        "%s.",
        dataset_meta.total_episodes,
        dataset_meta.repo_id,
        lam_path,
        key.camera_key,
        folder,
    )
    dataset = _whole_dataset(dataset_meta, video_backend)
    lam = load_lam(lam_path, device=str(config.device), dtype=getattr(torch, config.lam_dtype))
    named = Path(lam_path).expanduser()
    try:
        with torch.random.fork_rng(devices=[]):  # a run that builds draws the numbers of one that does not
            precompute_tokens(
                dataset,
                lam,
                folder,
                camera_key=key.camera_key,
                lam_path=str(named.resolve()) if named.is_dir() else lam_path,
                frame_stride=key.frame_stride,
                use_vq_tokens=config.lam_use_vq_tokens,
                video_backend=video_backend,
                extend=_earlier_versions(key),
            )
    except DecodeError as error:
        raise ExtractionError(
            f"the store of --policy.lam_tokens_path=auto cannot be built: {error.what}. Repair the file; or "
            "make a store with lerobot-lam-precompute, which has flags for such episodes (--on_error=skip, "
            "--tolerance_s), and name it instead of auto"
        ) from error
    except BaseException:
        told = how_to_go_on(folder)
        if told:
            logger.warning("Stopped while building LAM tokens. %s.", told)
        raise
    if lam.device.type == "cuda":
        del lam
        torch.cuda.empty_cache()  # the policy needs the memory now


def _whole_dataset(dataset_meta: Any, video_backend: str) -> LeRobotDataset:
    """All episodes, whichever of them are trained on; what is not on this machine yet is fetched."""
    try:
        return open_whole(
            dataset_meta,
            root=getattr(
                dataset_meta, "_requested_root", dataset_meta.root
            ),  # None: the Hub's cache, not in it
            revision=dataset_meta.revision,
            video_backend=video_backend,
        )
    except DatasetError as error:
        raise ExtractionError(
            "--policy.lam_tokens_path=auto needs all episodes of a dataset on this machine: "
            f"{error}, or name a token store instead of auto"
        ) from error
