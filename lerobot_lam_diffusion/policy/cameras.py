"""The names of a camera in the policy and in the dataset.

`--rename_map` renames the dataset's cameras, and LeRobot does not pass the map to the policy. Instead, the
pre-processor reports its effect with each batch (`observation.lam_cameras`: the policy's name → the
dataset's). A policy that may be fine-tuned under a map thus learns the names from its first batch, before its
first step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.tokens.dataset_check import not_rgb
from lerobot_lam_diffusion.utils.errors import DatasetError, TrainingError, raise_problems


def rgb_cameras(dataset_meta: Any) -> list[str]:
    """The dataset's cameras that a LAM can look at."""
    others = not_rgb(dataset_meta)
    return [key for key in dataset_meta.camera_keys if key not in others]


def may_be_exchanged(config: DiffusionLamConfig, dataset_meta: Any) -> bool:
    """Whether a `rename_map` may give one of the dataset's cameras the name of another.

    LeRobot applies the map to the pre-processor that comes with a checkpoint, never to a fresh one.
    """
    trained_before = config.lam_source is not None or bool(config.pretrained_path)
    return trained_before and len(rgb_cameras(dataset_meta)) > 1


def presumed_names(config: DiffusionLamConfig, dataset_meta: Any) -> dict[str, str]:
    """The policy's camera names → the dataset's if no batch has reported them: assumed to be the same."""
    cameras = rgb_cameras(dataset_meta)
    only = dict.fromkeys(config.image_features, cameras[0]) if len(cameras) == 1 else {}
    return {**only, **{camera: camera for camera in cameras}}


def visible_cameras(config: DiffusionLamConfig, dataset_meta: Any) -> list[str]:
    """The policy's cameras and the dataset's others: the LAM's camera need not be an input of the policy.

    Names that differ from the dataset's reveal a `rename_map`; then only the policy's own cameras are
    certain.
    """
    cameras = list(config.image_features)
    if dataset_meta is None or not set(cameras) <= set(dataset_meta.camera_keys):
        return cameras
    hidden = {*cameras, *dataset_meta.depth_keys}
    return cameras + [key for key in dataset_meta.camera_keys if key not in hidden]


def policy_camera(config: DiffusionLamConfig, camera: str, dataset_meta: Any) -> str | None:
    """The policy's name of a camera of the dataset; None where a `rename_map` hides it."""
    if camera in visible_cameras(config, dataset_meta):
        return camera
    cameras = list(config.image_features)
    only_one = len(cameras) == 1 and dataset_meta is not None and len(dataset_meta.camera_keys) == 1
    return cameras[0] if only_one else None


def dataset_camera(
    config: DiffusionLamConfig, camera: str, dataset_meta: Any, names: Mapping[str, str] | None = None
) -> str:
    """The dataset's name of a camera that the policy calls `camera`.

    Args:
        names: The policy's camera names → the dataset's, from a batch. Without them, a new name is
            understood only if the dataset has a single camera.

    Raises:
        DatasetError: the dataset's camera cannot be determined, or is not RGB.
    """
    others, cameras = not_rgb(dataset_meta), rgb_cameras(dataset_meta)
    camera = (names or {}).get(camera, camera)
    if camera in cameras:
        return camera
    if len(cameras) == 1 and list(config.image_features) == [camera]:
        return cameras[0]
    if camera in others:
        raise DatasetError(
            f"--policy.lam_camera_key={camera} {others[camera]}, and a LAM looks at RGB: dataset "
            f"{dataset_meta.repo_id!r} has the RGB cameras {cameras}; name one of them"
        )
    raise DatasetError(
        f"--policy.lam_camera_key={camera} is not among the RGB cameras {cameras} of dataset "
        f"{dataset_meta.repo_id!r}; name one of them. If --rename_map gives it that name, it cannot be known "
        "which one it was, as --policy.lam_tokens_path=auto and --policy.lam_live_cache have to: make the "
        "store with lerobot-lam-precompute --camera_key=<the dataset's own name> and pass its path"
    )


def camera_problems(config: DiffusionLamConfig, keys: Sequence[str | None], dataset_meta: Any) -> list[str]:
    """Known reasons why the LAMs cannot use the cameras `keys` (from `lam_camera_key`).

    The cameras of a robot or environment become known only when its first frames arrive.
    """
    cameras = visible_cameras(config, dataset_meta)
    if not cameras or (dataset_meta is None and config.lam_source is not None):
        return []
    others = {} if dataset_meta is None else not_rgb(dataset_meta)
    problems = []
    for camera in dict.fromkeys(keys):
        if camera in others:
            why = f"{others[camera]}, and a LAM looks at RGB; pass another camera"
        elif camera not in cameras:
            why = f"is not among the policy's cameras {cameras}; pass one of them"
        else:
            continue
        problems.append(f"--policy.lam_camera_key={camera} {why}")
    return problems


def check_cameras(
    config: DiffusionLamConfig,
    names: Mapping[str, str],
    of_tokens: Sequence[str | None],
    are_all: bool = True,
) -> None:
    """Check that the tokens of each source come from the camera that the policy calls `lam_camera_key`.

    Args:
        names: The policy's name for each camera in a batch → the dataset's.
        of_tokens: The dataset's name for the camera of each source's tokens; None if unknown.
        are_all: Whether `names` covers all of the policy's cameras.

    Raises:
        TrainingError: the tokens come from another camera.
    """
    problems = []
    for source, camera in zip(config.token_sources, of_tokens, strict=True):
        key = source.camera_key
        if camera is None or key is None or names.get(key) == camera:
            continue
        if key in names:
            right = [name for name, of_dataset in names.items() if of_dataset == camera]
            instead = f", or pass --policy.lam_camera_key={right[0]}" if right else ""
            problems.append(
                f"the tokens are of the dataset's camera {camera}, and --policy.lam_camera_key={key} is its "
                f"{names[key]} here (see --rename_map): train on tokens of {names[key]} "
                f"(lerobot-lam-precompute --camera_key={names[key]}){instead}"
            )
        elif are_all:
            problems.append(
                f"--policy.lam_camera_key={key} is not among the policy's cameras {sorted(names)}; pass one "
                "of them"
            )
    raise_problems("tokens of another camera than the policy's", problems, TrainingError)


def frame_size(dataset_meta: Any, camera: str | None) -> str | None:
    """Height x width of a camera's frames in the dataset, "480x640"."""
    feature = dataset_meta.features.get(camera)
    if feature is None:
        return None
    names = feature.get("names") or ["height", "width", "channels"]
    sides = [str(side) for side, name in zip(feature["shape"], names, strict=False) if "channel" not in name]
    return "x".join(sides) if len(sides) == 2 else None
