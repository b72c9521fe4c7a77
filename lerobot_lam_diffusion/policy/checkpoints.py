"""Weights of checkpoints, by their plain names: our own, and a stock Diffusion Policy's as a warm start."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from lerobot_lam_diffusion.utils.errors import TrainingError, one_line, raise_problems

COMPILED = "_orig_mod."
"""`torch.compile` adds it to the name of every parameter of a module, in checkpoints too."""

# What shapes the weights, or what they mean. Other fields (learning rate, device, ...) may differ.
MUST_AGREE = (
    "n_obs_steps", "horizon", "normalization_mapping", "vision_backbone", "resize_shape", "crop_shape",
    "use_group_norm", "spatial_softmax_num_keypoints", "use_separate_rgb_encoder_per_camera", "down_dims",
    "kernel_size", "n_groups", "diffusion_step_embed_dim", "use_film_scale_modulation",
    "noise_scheduler_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end",
    "prediction_type", "clip_sample", "clip_sample_range",
)  # fmt: skip


def plain(name: str) -> str:
    """A parameter's name without what `torch.compile` adds."""
    return name.replace(COMPILED, "")


def load_weights(
    module: nn.Module, weights: dict[str, Tensor], where: str, may_lack: set[str] | None = None
) -> None:
    """Load `weights` strictly, whether or not they or `module` are compiled.

    Stock LeRobot only warns about a checkpoint whose names do not fit, and continues with random weights.

    Args:
        module: Module to load into.
        weights: Parameter name → tensor.
        where: The file, for the message.
        may_lack: Plain names that `weights` may lack.

    Raises:
        TrainingError: names or shapes do not fit.
    """
    own = module.state_dict()
    names = {plain(name): name for name in own}
    given = {names.get(plain(name), name): tensor for name, tensor in weights.items()}
    lacking = {name: own[name] for name in own if plain(name) in (may_lack or set())}
    try:
        module.load_state_dict(lacking | given)
    except RuntimeError as error:  # lists missing, unexpected and misshapen tensors
        remedy = "name a checkpoint of this policy, and leave out flags that change its network"
        if any(name.startswith("normalize_inputs.") for name in given):
            remedy = (
                "they are of a LeRobot before processors: migrate them with python -m "
                "lerobot.processor.migrate_policy_normalization --pretrained-path=…"
            )
        raise TrainingError(
            f"the weights in {where} do not fit this policy ({one_line(error)}); {remedy}"
        ) from error


def load_stock_weights(policy: nn.Module, config: Any, checkpoint: str, own_parameters: set[str]) -> None:
    """Initialise `policy` from a stock Diffusion Policy; its loss is then the stock loss, bit for bit.

    Args:
        policy: A fresh `DiffusionLamPolicy`.
        config: Its `DiffusionLamConfig`.
        checkpoint: Folder or Hub id of the stock checkpoint.
        own_parameters: Plain names of the parameters that only `policy` has; they stay as they are.

    Raises:
        TrainingError: not a stock diffusion checkpoint, or fields that must agree differ; lists all of them.
    """
    flag = f"--policy.init_from_stock={checkpoint}"
    try:
        stock = PreTrainedConfig.from_pretrained(checkpoint)
    except (FileNotFoundError, ValueError) as error:
        raise TrainingError(f"{flag} is not a policy checkpoint: {error}") from error
    if type(stock) is not DiffusionConfig:
        raise TrainingError(
            f"{flag} is a policy of type {stock.type!r}, expected 'diffusion'; a diffusion_lam checkpoint is "
            "fine-tuned with --policy.path"
        )
    mine, theirs = _comparable(config), _comparable(stock)
    problems = [
        f"--policy.{name} is {mine[name]}, the stock policy has {theirs[name]}"
        for name in mine
        if mine[name] != theirs[name]
    ]
    raise_problems(f"{flag} is another architecture", problems, TrainingError)
    file = Path(checkpoint) / "model.safetensors"
    if not Path(checkpoint).is_dir():
        file = Path(hf_hub_download(checkpoint, "model.safetensors"))
    elif not file.is_file():
        raise TrainingError(
            f"{flag} has no model.safetensors; name the folder pretrained_model of a stock diffusion "
            "checkpoint"
        )
    load_weights(policy, load_file(file), str(file), may_lack=own_parameters)


def _comparable(config: DiffusionConfig) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in MUST_AGREE}
    for side in ("input_features", "output_features"):
        features = getattr(config, side) or {}
        values[side] = {name: feature.shape for name, feature in sorted(features.items())}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
