"""Pre- and post-processors of `diffusion_lam`: LeRobot's, with the raw frames kept for the LAM."""

from dataclasses import dataclass
from typing import Any

from lerobot.processor import (
    ObservationProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    RenameObservationsProcessorStep,
    make_default_pre_post_processors,
)
from lerobot.processor.factory import make_default_policy_processor_steps, make_policy_processor_pipelines
from lerobot.utils.constants import OBS_PREFIX
from torch import Tensor

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.constants import OBS_LAM_CAMERAS, OBS_LAM_IMAGES


@dataclass
class rename_observations_processor(RenameObservationsProcessorStep):  # noqa: N801
    """LeRobot's renaming, which also reports what it renamed.

    A policy never sees the `rename_map`, but its tokens must be of the camera that it looks at.
    `observation.lam_cameras` becomes a dict: name after renaming → name before it.

    The class bears the name of LeRobot's step, to which LeRobot passes `--rename_map`.
    """

    _registry_name = None  # not inherited: it would be loaded as the parent class

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        before = {id(value): key for key, value in observation.items() if _is_rgb(key, value)}
        renamed = super().observation(observation)
        names = {key: before[id(value)] for key, value in renamed.items() if id(value) in before}
        return {**renamed, OBS_LAM_CAMERAS: names}


@dataclass
@ProcessorStepRegistry.register(name="lam_images_processor")
class LamImagesProcessorStep(ObservationProcessorStep):
    """Pass on references to all RGB frames before they are normalised.

    `observation.lam_images` becomes a dict of camera → frames `(..., 3, H, W)` in 0..1. The step is saved
    with the checkpoint, so it stores no camera: the policy's `lam_camera_key`, which a flag can change,
    selects one.
    """

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        frames = {key: value for key, value in observation.items() if _is_rgb(key, value)}
        return {**observation, OBS_LAM_IMAGES: frames}

    def transform_features(self, features: Any) -> Any:
        return features


def _is_rgb(key: str, value: Any) -> bool:
    is_image = isinstance(value, Tensor) and value.ndim >= 3 and value.shape[-3] == 3
    return is_image and key.startswith(OBS_PREFIX)


def make_diffusion_lam_pre_post_processors(
    config: DiffusionLamConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """LeRobot's default pipelines, with the raw frames kept for the LAM. Tokens pass through unchanged.

    Args:
        config: Policy configuration.
        dataset_stats: Statistics for normalisation.

    Returns:
        The pre-processor (rename, batch, device, raw frames, normalise) and the post-processor (unnormalise,
        CPU).
    """
    if not config.use_lam_conditioning:
        return make_default_pre_post_processors(config, dataset_stats)
    steps = make_default_policy_processor_steps(config, dataset_stats)
    rename = rename_observations_processor(rename_map=steps.rename_observations.rename_map)
    return make_policy_processor_pipelines(
        input_steps=[rename, steps.add_batch_dim, steps.to_device, LamImagesProcessorStep(), steps.normalize],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )
