"""`--policy.lam_tokens_path=auto`: the policy's token store from the cache, built first if it is missing.

Imports `precompute`, so it is imported only for `auto`.
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
from lerobot_lam_diffusion.lam import fingerprint_of, proposed_stride, read_config, recorded_path
from lerobot_lam_diffusion.policy.cameras import dataset_camera
from lerobot_lam_diffusion.policy.lams import check_lams, find_lams, open_lam
from lerobot_lam_diffusion.precompute.cache import CacheEntry, cached_entries
from lerobot_lam_diffusion.precompute.dataset import dataset_info, open_whole
from lerobot_lam_diffusion.precompute.engine import precompute_tokens, resume_hint
from lerobot_lam_diffusion.precompute.frames import DecodeError, decoder_of
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.episode_hashes import are_known
from lerobot_lam_diffusion.tokens.frames_digest import frames_digest
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS, OF_THE_DATASET, VQ, LamInfo, Provenance
from lerobot_lam_diffusion.tokens.storage import storage_dtype_of
from lerobot_lam_diffusion.utils.errors import DatasetError, ExtractionError, UserError

logger = logging.getLogger(__name__)


def described_lams(config: DiffusionLamConfig) -> tuple[list[LamInfo], list[Any]]:
    """Each source's LAM, checked to fit `config`, and its config; weights are hashed, but not loaded."""
    folders = find_lams(config)
    shapes = [read_config(folder) for folder in folders]
    lams = [
        LamInfo(
            path=str(source.model_path),
            revision=None,
            fingerprint=fingerprint_of(folder),
            num_learned_tokens=shape.num_learned_tokens,
            action_latent_dim=shape.action_latent_dim,
            num_codes=shape.num_codes,
            token_scale=1.0,  # follows from the weights
        )
        for source, folder, shape in zip(config.token_sources, folders, shapes, strict=True)
    ]
    check_lams(config, lams)
    return lams, shapes


def cached_stores(
    config: DiffusionLamConfig, dataset_meta: Any, names: Mapping[str, str] | None = None
) -> list[TokenStore]:
    """Return, for each source, the store of the whole dataset's tokens that `config` asks for.

    Args:
        config: Has `lam_model_path` and `lam_camera_key` set; fields that contradict a LAM are rejected
            before anything is built.
        dataset_meta: `LeRobotDatasetMetadata`, or None outside training.
        names: The policy's camera names → the dataset's, where known.

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
    lams, shapes = described_lams(config)
    fps, video_backend = float(dataset_meta.fps), get_safe_default_video_backend()
    stride = config.lam_frame_stride or proposed_stride(shapes, fps)
    if config.lam_frame_stride is None and stride is not None:
        logger.info(
            "lam_frame_stride is %d: the LAM was trained on pairs some %.2g s apart, and the dataset has %g "
            "fps.", stride, stride / fps, fps,
        )  # fmt: skip
    config.lam_frame_stride = stride or 1
    stores = []
    kind = VQ if config.lam_use_vq_tokens else CONTINUOUS
    for camera_key, lam in zip(cameras, lams, strict=True):
        _fetch_frames(dataset_meta, camera_key, video_backend)
        wanted = Provenance(
            dataset=dataset_info(dataset_meta, camera_key),
            lam=lam,
            camera_key=camera_key,
            frame_stride=config.lam_frame_stride,
            stride_seconds=config.lam_frame_stride / fps,
            token_kind=kind,
            dtype=config.lam_dtype,
            versions={},
            storage_dtype=storage_dtype_of(kind, "", lam.num_codes),
            device=torch.device(str(config.device)).type,
            decoder=decoder_of(dataset_meta, camera_key, video_backend),
        )
        build = partial(
            _build, wanted=wanted, config=config, dataset_meta=dataset_meta, video_backend=video_backend
        )
        stores.append(CacheEntry.of(wanted).open(dataset_meta, build))
    return stores


def _fetch_frames(dataset_meta: Any, camera_key: str, video_backend: str) -> None:
    """Fetch all of a camera's frames to this machine, so that their digest can name the store."""
    if frames_digest(dataset_meta, camera_key) is None:
        _whole_dataset(dataset_meta, video_backend)
    if frames_digest(dataset_meta, camera_key) is None:
        raise ExtractionError(
            f"--policy.lam_tokens_path=auto needs all episodes of {dataset_meta.repo_id!r}, and data or "
            f"video files of {camera_key} are missing in {dataset_meta.root}, or hold other than its "
            f"{dataset_meta.total_frames} frames; restore the dataset, or name a token store instead of auto"
        )


def _earlier_versions(wanted: Provenance) -> list[TokenStore]:
    """Finished stores in the cache whose tokens were made in the same way, of other frames."""
    stores = []
    for entry in cached_entries():
        try:
            if not entry.is_finished or entry.provenance().differences(wanted, ignore=OF_THE_DATASET):
                continue
            store = TokenStore.load(entry.folder)
        except (UserError, OSError):
            continue  # damaged, or removed meanwhile: nothing is taken from it
        if are_known(store.episode_hash).any():
            stores.append(store)
    return stores


def _build(
    folder: Path,
    wanted: Provenance,
    config: DiffusionLamConfig,
    dataset_meta: Any,
    video_backend: str,
) -> None:
    logger.info(
        "LAM tokens: building the store of all %d episodes of %s with %s of %s, once for all experiments, in "
        "%s.", dataset_meta.total_episodes, dataset_meta.repo_id, wanted.lam.path, wanted.camera_key, folder,
    )  # fmt: skip
    dataset = _whole_dataset(dataset_meta, video_backend)
    lam = open_lam(config, wanted.lam.path, str(config.device))
    if lam.fingerprint != wanted.lam.fingerprint:
        raise ExtractionError(
            f"the LAM {wanted.lam.path} was replaced while its tokens were being prepared; start again"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # building must not change a run's random numbers
            precompute_tokens(
                dataset,
                lam,
                folder,
                camera_key=wanted.camera_key,
                lam_path=recorded_path(wanted.lam.path),
                frame_stride=wanted.frame_stride,
                use_vq_tokens=config.lam_use_vq_tokens,
                video_backend=video_backend,
                extend=_earlier_versions(wanted),
            )
    except DecodeError as error:
        raise ExtractionError(
            f"the store of --policy.lam_tokens_path=auto cannot be built: {error}; or make a store with "
            "lerobot-lam-precompute, which has flags for such episodes (--on_error=skip, --tolerance_s), and "
            "name it instead of auto"
        ) from error
    except BaseException:
        hint = resume_hint(folder)
        if hint:
            logger.warning("Stopped while building LAM tokens. %s.", hint)
        raise
    if lam.device.type == "cuda":
        del lam
        torch.cuda.empty_cache()  # the policy needs the memory now


def _whole_dataset(dataset_meta: Any, video_backend: str) -> LeRobotDataset:
    """All episodes, whichever of them are trained on; what is not on this machine yet is fetched."""
    try:
        return open_whole(
            dataset_meta,
            # None for a dataset in the Hub's cache, which LeRobot opens without a root
            root=getattr(dataset_meta, "_requested_root", dataset_meta.root),
            revision=dataset_meta.revision,
            video_backend=video_backend,
        )
    except DatasetError as error:
        raise ExtractionError(
            "--policy.lam_tokens_path=auto needs all episodes of a dataset on this machine: "
            f"{error}, or name a token store instead of auto"
        ) from error
