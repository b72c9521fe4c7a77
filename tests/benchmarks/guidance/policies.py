"""Tokens of the demonstrations and of the videos, and policies that are trained on them."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors

from lerobot_lam_diffusion import DiffusionLamConfig
from lerobot_lam_diffusion.demo.pusht import FPS
from lerobot_lam_diffusion.demo.record import IMAGE_KEY
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.scripts.precompute_lam_tokens import main as precompute_command

from .demonstrations import ACTION, ENV, STATE, opened

LAM = "pusht-compact"
PIXELS = 48  # side of the pixel policy's picture


def store_of_videos(videos: Path, store: Path, fps: int = FPS) -> Path:
    """The videos' tokens, by the command that a user would run."""
    if not store.exists():
        precompute_command(
            [
                f"--videos={videos}",
                f"--fps={fps}",
                f"--lam.path={LAM}",
                f"--output_dir={store}",
                "--device=cpu",
            ]
        )
    return store


def training_tokens(work_dir: Path) -> Path:
    if not (work_dir / "tokens").exists():
        precompute_tokens(
            opened(work_dir),
            load_lam(LAM),
            work_dir / "tokens",
            camera_key=IMAGE_KEY,
            lam_path=LAM,
            show_progress=False,
        )
    return work_dir / "tokens"


class Batches:
    """Training batches out of memory, windows cut as LeRobot cuts them; tokens are joined by the policy."""

    def __init__(self, data: LeRobotDataset, config: DiffusionLamConfig) -> None:
        columns = [key for key in (STATE, ENV, ACTION) if key in {*config.input_features, ACTION}]
        table = data.hf_dataset.with_format("torch").select_columns([*columns, "episode_index"])
        self.columns = {key: torch.stack(list(table[key])).float() for key in columns}
        if IMAGE_KEY in config.input_features:
            self.columns[IMAGE_KEY] = torch.cat([small(data[i][IMAGE_KEY][None]) for i in range(len(data))])
        episode = torch.stack(list(table["episode_index"]))
        starts = torch.tensor(data.meta.episodes["dataset_from_index"])
        stops = torch.tensor(data.meta.episodes["dataset_to_index"])
        self.first, self.last = starts[episode], stops[episode] - 1
        self.deltas = {
            key: config.action_delta_indices if key == ACTION else config.observation_delta_indices
            for key in self.columns
        }

    def draw(self, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        index = torch.randint(len(self.first), (size,), generator=generator)
        batch = {"index": index}
        for key, values in self.columns.items():
            wanted = index[:, None] + torch.tensor(self.deltas[key])
            frames = wanted.clamp(self.first[index, None], self.last[index, None])
            batch[key] = values[frames] / 255 if key == IMAGE_KEY else values[frames]
            batch[f"{key}_is_pad"] = frames != wanted
        return batch


def small(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 `(B, 3, H, W)` at the pixel policy's size."""
    size = (PIXELS, PIXELS)
    return torch.nn.functional.interpolate(pictures.float(), size, mode="area").round().to(torch.uint8)


def fields(observations: str, device: str, store: Path, offsets: list[int]) -> dict[str, Any]:
    inputs = {STATE: PolicyFeature(FeatureType.STATE, (2,))}
    if observations == "pixels":
        inputs[IMAGE_KEY] = PolicyFeature(FeatureType.VISUAL, (3, PIXELS, PIXELS))
    else:
        inputs[ENV] = PolicyFeature(FeatureType.ENV, (4,))
    return {
        "input_features": inputs,
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
        "device": device, "push_to_hub": False, "pretrained_backbone_weights": None, "crop_shape": None,
        "down_dims": (64, 128), "horizon": 16, "n_action_steps": 8, "spatial_softmax_num_keypoints": 16,
        "noise_scheduler_type": "DDIM", "num_inference_steps": 10,
        "use_precomputed_lam_tokens": True, "lam_tokens_path": str(store),
        "lam_token_offsets": offsets, "lam_token_dropout": 0.5,
    }  # fmt: skip


def train(work_dir: Path, args: argparse.Namespace, offsets: list[int], seed: int) -> Path:
    """A trained policy's folder."""
    name = f"{args.observations}_{offsets[0]:+d}to{offsets[-1]:+d}_seed{seed}_{args.steps}"
    folder = work_dir / "policies" / name
    if folder.exists():
        return folder
    started = time.perf_counter()
    data = opened(work_dir)
    config = DiffusionLamConfig(**fields(args.observations, args.device, training_tokens(work_dir), offsets))
    torch.manual_seed(seed)
    policy = make_policy(config, ds_meta=data.meta).train()
    preprocess, postprocess = make_pre_post_processors(config, dataset_stats=data.meta.stats)
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-4, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.steps)
    batches, generator = Batches(data, config), torch.Generator().manual_seed(seed)
    size = 32 if args.observations == "pixels" else 64
    for step in range(args.steps):
        loss, _ = policy.forward(preprocess(batches.draw(size, generator)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0 or step == args.steps - 1:
            print(
                f"{name} step {step} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True
            )
    policy.save_pretrained(folder)
    preprocess.save_pretrained(folder)
    postprocess.save_pretrained(folder)
    return folder
