"""Small policies on the datasets of `conftest.py`, built the way `lerobot-train` builds them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.factory import make_policy, make_pre_post_processors
from torchvision.models.resnet import BasicBlock, ResNet

from lerobot_lam_diffusion import DiffusionLamConfig
from lerobot_lam_diffusion.utils.errors import UserError
from tests import TOP


class NarrowResNet(ResNet):
    """ResNet-18 with an eighth of its channels: drawing 11 million weights takes longer than most tests."""

    def __init__(self, weights: None = None, **options: Any) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], **options)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> torch.nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **options)


torchvision.models.resnet_narrow = NarrowResNet  # LeRobot looks a backbone up here, by its name

SMALL = {
    "device": "cpu",
    "vision_backbone": "resnet_narrow",
    "pretrained_backbone_weights": None,
    "push_to_hub": False,
    "down_dims": (16, 32),
    "n_groups": 4,
    "horizon": 8,
    "n_action_steps": 4,
    "num_train_timesteps": 10,
    "spatial_softmax_num_keypoints": 8,
}


def lam_config(**fields: Any) -> DiffusionLamConfig:
    return DiffusionLamConfig(**{"use_precomputed_lam_tokens": True, **SMALL, **fields})


def live_config(lam_folder: Any, **fields: Any) -> DiffusionLamConfig:
    """Of a policy that computes its tokens on the fly, of the top camera."""
    on_the_fly = {
        "use_precomputed_lam_tokens": False,
        "lam_camera_key": TOP,
        "lam_model_path": str(lam_folder),
    }
    return lam_config(**{**on_the_fly, "num_inference_steps": 1, **fields})


def stock_config(**fields: Any) -> DiffusionConfig:
    return DiffusionConfig(**{**SMALL, **fields})


def build(config: DiffusionConfig, dataset: LeRobotDataset, seed: int = 0) -> Any:
    """A policy and its pre-processor, with weights drawn from `seed`."""
    torch.manual_seed(seed)
    policy = make_policy(config, ds_meta=dataset.meta)
    preprocessor, _ = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    return policy, preprocessor


def training_batch(config: DiffusionConfig, dataset: LeRobotDataset, rows: list[int]) -> dict[str, Any]:
    """A collated batch of these rows with the windows that the policy asks for, float images."""
    windows = {key: tuple(window) for key, window in resolve_delta_timestamps(config, dataset.meta).items()}
    windowed = _windowed(dataset.repo_id, dataset.root, tuple(windows.items()))
    return torch.utils.data.default_collate([windowed[row] for row in rows])


@cache
def _windowed(repo_id: str, root: Path, windows: tuple[tuple[str, tuple[float, ...]], ...]) -> LeRobotDataset:
    """Opening a dataset takes longer than a training step."""
    deltas = {key: list(window) for key, window in windows}
    return LeRobotDataset(repo_id, root=root, delta_timestamps=deltas, video_backend="pyav")


def observation(
    dataset: LeRobotDataset, rows: list[int], cameras: Iterable[str] = (TOP,)
) -> dict[str, torch.Tensor]:
    """What a robot, or as many environments as `rows`, sees at one tick; images as LeRobot passes them on."""
    items = [dataset[row] for row in rows]
    pictures = {camera: torch.stack([item[camera] for item in items]).float() / 255 for camera in cameras}
    return {"observation.state": torch.stack([item["observation.state"] for item in items]), **pictures}


def teach(policy: Any, batch: dict[str, Any], steps: int = 50) -> None:
    """Train on one batch, reproducibly, until the policy knows it."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    policy.train()
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        policy.forward(dict(batch))[0].backward()
        optimizer.step()


@contextmanager
def refused(*parts: str, error: type[Exception] = UserError) -> Iterator[None]:
    """Expect a user's error whose message has all these parts."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert not [part for part in parts if part not in message], message


def record_tokens(policy: Any) -> list[torch.Tensor]:
    """The tokens `(B, T, n·a)`, divided by their scale, of each forward pass from now on."""
    seen: list[torch.Tensor] = []
    policy.diffusion.lam_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def make_lam_weights_matter(policy: Any) -> None:
    """They are zero at the start, so that tokens would not show in a loss."""
    torch.manual_seed(3)
    for name, parameter in policy.named_parameters():
        if name.endswith("cond_encoder.lam.weight"):
            torch.nn.init.normal_(parameter)
