"""Which camera of the dataset each of the policy's cameras is, once `--rename_map` has been at work.

LeRobot does not show the map to a policy. The pre-processor tells its effect with each batch
(`observation.lam_cameras`), so a policy that may be fine-tuned under one learns it from its first batch,
before its first step.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.problems import TrainingError, raise_problems

logger = logging.getLogger(__name__)


def rgb_cameras(dataset_meta: Any) -> list[str]:
    """The dataset's cameras that a LAM can look at."""
    return [key for key in dataset_meta.camera_keys if key not in dataset_meta.depth_keys]


def may_be_exchanged(config: DiffusionLamConfig, dataset_meta: Any) -> bool:
    """Whether a `rename_map` may give one of the dataset's cameras the name of another.

    LeRobot applies the map to the pre-processor that comes with a checkpoint, never to a fresh one.
    """
    trained_before = config.lam_source is not None or bool(config.pretrained_path)
    return trained_before and len(rgb_cameras(dataset_meta)) > 1


def check_cameras(
    config: DiffusionLamConfig,
    names: Mapping[str, str],
    of_tokens: Sequence[str | None],
    are_all: bool = True,
) -> None:
    """Check that the tokens of each source are of the camera that the policy knows as `lam_camera_key`.

    Args:
        names: The policy's name of each camera in a batch → the dataset's.
        of_tokens: The dataset's name of the camera that each source's tokens are of, None if it is not known.
        are_all: Whether there are no other names than these.

    Raises:
        TrainingError: they are of another camera.
    """
    problems = []
    for source, camera in zip(config.token_sources, of_tokens, strict=True):
        key = source.camera_key
        if camera is None or key is None:
            continue
        if key not in names:
            if are_all:
                problems.append(
                    f"--policy.lam_camera_key={key} is not among the policy's cameras {sorted(names)}; pass "
                    "one of them"
                )
        elif names[key] != camera:
            right = [name for name, of_dataset in names.items() if of_dataset == camera]
            instead = f", or pass --policy.lam_camera_key={right[0]}" if right else ""
            problems.append(
                f"the tokens are of the dataset's camera {camera}, and --policy.lam_camera_key={key} is its "
                f"{names[key]} here (see --rename_map): train on tokens of {names[key]} "
                f"(lerobot-lam-precompute --camera_key={names[key]}){instead}"
            )
    raise_problems("tokens of another camera than the policy's", problems, TrainingError)


def presumed_names(config: DiffusionLamConfig, dataset_meta: Any) -> dict[str, str]:
    """The policy's names of cameras → the dataset's where no batch tells: the same, or the only one."""
    cameras = rgb_cameras(dataset_meta)
    only = dict.fromkeys(config.image_features, cameras[0]) if len(cameras) == 1 else {}
    return {**only, **{camera: camera for camera in cameras}}


def named_by_policy(names: Mapping[str, str], camera: str | None) -> str | None:
    """The policy's name of a camera of the dataset."""
    return next((name for name, of_dataset in names.items() if of_dataset == camera), None)


def frame_size(dataset_meta: Any, camera: str | None) -> str | None:
    """Height x width of a camera's frames in the dataset, "480x640"."""
    feature = dataset_meta.features.get(camera)
    if feature is None:
        return None
    shape, names = list(feature["shape"]), list(feature.get("names") or [])
    channels = next((at for at, name in enumerate(names) if name in ("channel", "channels")), 2)
    sides = [side for at, side in enumerate(shape) if at != channels]
    return f"{sides[0]}x{sides[1]}" if len(sides) == 2 else None
