"""Pre- and post-processors of `diffusion_lam`."""

from typing import Any

from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors
from torch import Tensor

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig


def make_diffusion_lam_pre_post_processors(
    config: DiffusionLamConfig,
    dataset_stats: dict[str, dict[str, Tensor]] | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """LeRobot's default pipelines: LAM tokens pass through them untouched.

    Args:
        config: Policy configuration.
        dataset_stats: Statistics for normalisation.

    Returns:
        The pre-processor (rename, batch, device, normalise) and the post-processor (unnormalise, CPU).
    """
    return make_default_pre_post_processors(config, dataset_stats)
