"""What the tokens of a dataset are, before there are any: the provenance that an extraction begins with."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.problems import ExtractionError
from lerobot_lam_diffusion.tokens.binding import dataset_digest
from lerobot_lam_diffusion.tokens.frames_digest import frames_digest
from lerobot_lam_diffusion.tokens.provenance import (
    CONTINUOUS,
    PACKAGE,
    UNKNOWN_DECODER,
    VQ,
    DatasetOrigin,
    LamOrigin,
    Provenance,
)
from lerobot_lam_diffusion.tokens.storage import storage_dtype_of

_PACKAGE_OF = {"pyav": "av", "torchcodec": "torchcodec", "images": "pillow"}


def provenance_of(
    meta: Any,
    lam: Any,
    *,
    camera_key: str,
    lam_path: str,
    frame_stride: int,
    use_vq_tokens: bool,
    storage_dtype: str = "",
    decoder: str = UNKNOWN_DECODER,
) -> Provenance:
    """Describe the tokens that `lam` makes of a dataset.

    Args:
        meta: `LeRobotDatasetMetadata`.
        lam: What `load_lam` returns, on the device where it will run.
        camera_key: The dataset's name of the camera that the LAM looks at.
        lam_path: How the user named the LAM.
        frame_stride: Gap of a pair, in frames.
        use_vq_tokens: VQ or continuous tokens; a LAM without a codebook has only the latter.
        storage_dtype: How continuous tokens are kept; empty: float32.
        decoder: The way from files to pixels, see `Provenance`.

    Raises:
        ExtractionError: VQ tokens of a LAM without a codebook.
    """
    if use_vq_tokens and lam.codebook is None:
        raise ExtractionError(
            f"the LAM {lam_path} has no codebook, so it makes no VQ tokens: extract continuous ones by "
            "--use_vq_tokens=false"
        )
    dataset = DatasetOrigin(
        repo_id=meta.repo_id,
        revision=meta.revision,
        total_frames=meta.total_frames,
        total_episodes=meta.total_episodes,
        fps=meta.fps,
        digest=dataset_digest(meta, camera_key),
        frames=frames_digest(meta, camera_key) or "",
    )
    return provenance_of_frames(
        dataset,
        lam,
        camera_key=camera_key,
        lam_path=lam_path,
        frame_stride=frame_stride,
        use_vq_tokens=use_vq_tokens,
        storage_dtype=storage_dtype,
        decoder=decoder,
    )


def provenance_of_frames(
    dataset: DatasetOrigin,
    lam: Any,
    *,
    camera_key: str,
    lam_path: str,
    frame_stride: int,
    use_vq_tokens: bool,
    storage_dtype: str = "",
    decoder: str = UNKNOWN_DECODER,
) -> Provenance:
    """`provenance_of` where it is known already which frames they are."""
    kind = VQ if use_vq_tokens else CONTINUOUS
    packages = [PACKAGE, "lerobot", "torch", "safetensors"]
    return Provenance(
        dataset=dataset,
        lam=LamOrigin(
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
        versions=_versions(packages) | decoder_version(decoder),
        storage_dtype=storage_dtype_of(kind, storage_dtype, lam.num_codes),
        device=lam.device.type,
        decoder=decoder,
    )


def decoder_version(decoder: str) -> dict[str, str]:
    """The package behind a decoder and its version; empty for an unknown one."""
    return _versions([_PACKAGE_OF[decoder]] if decoder in _PACKAGE_OF else [])


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def codebook_of(lam: Any) -> Tensor:
    """float32 `(K, a)` on the CPU; empty for a LAM without a codebook."""
    return torch.empty(0) if lam.codebook is None else lam.codebook.cpu()


def episode_bounds(meta: Any) -> tuple[Tensor, Tensor]:
    """First frame and end of every episode of a dataset, int64 `(E,)` each."""
    start = torch.tensor(meta.episodes["dataset_from_index"], dtype=torch.int64)
    stop = torch.tensor(meta.episodes["dataset_to_index"], dtype=torch.int64)
    return start, stop
