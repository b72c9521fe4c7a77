"""One trainer, one measure: the package's own policy on tensors in memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from torch import Tensor

from lerobot_lam_diffusion import DiffusionLamConfig, DiffusionLamPolicy

from .data import ACTION, ENV, IMAGE, STATE, Recorded
from .lams import Tokens

FEATURE_TYPES = {STATE: FeatureType.STATE, ENV: FeatureType.ENV}
CROP = 84  # px, of a picture of 96: LeRobot's default for PushT
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """What each policy gets, whatever it sees."""

    steps: int = 800
    batch_size: int = 64
    learning_rate: float = 3e-3
    down_dims: tuple[int, ...] = (32, 64)
    horizon: int = 8
    n_action_steps: int = 4
    noise_samples: int = 4
    every: int = 4  # held-out frames that are measured
    ema: float | None = None  # decay of averaged weights, which then are the policy's


class Windows:
    """Batches out of memory.

    Args:
        tokens: None: the stock Diffusion Policy.
        offsets: Of the tokens, as in `lam_token_offsets`.
    """

    def __init__(
        self, data: Recorded, n_obs_steps: int, horizon: int, tokens: Tokens | None, offsets: tuple[int, ...]
    ) -> None:
        self.data, self.columns, self.tokens, self.offsets = data, data.normalized(), tokens, list(offsets)
        self.observed = list(range(1 - n_obs_steps, 1))
        self.acted = list(range(1 - n_obs_steps, 1 - n_obs_steps + horizon))

    def features(self) -> dict[str, PolicyFeature]:
        return {
            key: PolicyFeature(FEATURE_TYPES[key], (values.shape[1],))
            for key, values in self.columns.items()
            if key != ACTION
        }

    def live(self, columns: Batch, frames: Callable[[], Tensor]) -> Batch:
        """What a policy that acts is shown: columns (B, D) as recorded, frames uint8 (B, 3, 96, 96)."""
        return {
            key: self.data.normalize(key, values) for key, values in columns.items() if key in self.columns
        }

    def batch(self, index: Tensor, augment: bool = False) -> Batch:
        acted, is_pad = self.data.window(index, self.acted)
        observed, _ = self.data.window(index, self.observed)
        batch = {key: values[observed] for key, values in self.columns.items() if key != ACTION}
        batch |= {ACTION: self.columns[ACTION][acted], "action_is_pad": is_pad}
        if self.tokens is not None:
            batch["observation.lam_tokens"] = self.tokens.store.window(
                index, self.offsets, ahead=max(self.offsets) > 0
            )
        return batch


class Pictures(Windows):
    """Pictures (B, T, 3, H, W) on -1…1 for keypoints: in training a random part of each, else its middle."""

    shrink = 1

    def __init__(self, data: Recorded, *args: Any) -> None:
        super().__init__(data.without_keypoints(), *args)

    def features(self) -> dict[str, PolicyFeature]:
        size = CROP // self.shrink
        return {**super().features(), IMAGE: PolicyFeature(FeatureType.VISUAL, (3, size, size))}

    def live(self, columns: Batch, frames: Callable[[], Tensor]) -> Batch:
        return {**super().live(columns, frames), IMAGE: self._cropped(frames(), False)}

    def batch(self, index: Tensor, augment: bool = False) -> Batch:
        observed, _ = self.data.window(index, self.observed)
        pictures = self._cropped(self.data.frames[observed], augment)
        return {**super().batch(index), IMAGE: pictures}

    def _cropped(self, frames: Tensor, augment: bool) -> Tensor:
        room = frames.shape[-1] - CROP
        at = torch.randint(room + 1, (len(frames), 2)) if augment else torch.full((len(frames), 2), room // 2)
        parts = [
            frame[..., y : y + CROP, x : x + CROP] for frame, (y, x) in zip(frames, at.tolist(), strict=True)
        ]
        pictures = torch.stack(parts) / 127.5 - 1
        flat = torch.nn.functional.avg_pool2d(pictures.flatten(0, -4), self.shrink)
        return flat.unflatten(0, pictures.shape[:-3])


class SmallPictures(Pictures):
    """Of half the size: what a CPU can train on."""

    shrink = 2


def config_of(windows: Windows, budget: Budget, device: str = "cpu") -> DiffusionLamConfig:
    columns, tokens = windows.columns, windows.tokens
    lam: dict[str, Any] = {"use_lam_conditioning": tokens is not None, "use_precomputed_lam_tokens": True}
    if tokens is not None:
        lam |= {
            "lam_num_learned_tokens": tokens.slots,
            "lam_action_latent_dim": tokens.store.token_dim // tokens.slots,
            "lam_token_scale": tokens.scale,
            "lam_token_offsets": windows.offsets,
        }
    return DiffusionLamConfig(
        input_features=windows.features(),
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (columns[ACTION].shape[1],))},
        device=device, push_to_hub=False, pretrained_backbone_weights=None, crop_shape=None,
        n_obs_steps=len(windows.observed), horizon=budget.horizon, n_action_steps=budget.n_action_steps,
        down_dims=budget.down_dims, diffusion_step_embed_dim=32,
        noise_scheduler_type="DDIM", num_inference_steps=10, **lam,
    )  # fmt: skip


class Captured:
    """A step that was recorded once as a CUDA graph: small policies spend their time launching kernels."""

    def __init__(self, step: Callable[[Batch], None], batch: Batch) -> None:
        self.batch = {key: value.cuda() for key, value in batch.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # so that libraries choose their kernels and Adam its state before
            for _ in range(3):
                step(self.batch)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step(self.batch)

    def __call__(self, batch: Batch) -> None:
        for key, value in batch.items():
            self.batch[key].copy_(value.pin_memory(), non_blocking=True)
        self.graph.replay()


def train(
    windows: Windows, frames: Tensor, budget: Budget, seed: int, device: str = "cpu"
) -> DiffusionLamPolicy:
    """A policy trained on the given frames; the seed decides weights, batches and noise."""
    torch.manual_seed(seed)
    on_gpu = device == "cuda"
    policy = DiffusionLamPolicy(config_of(windows, budget, device)).to(device).train()
    rate = torch.tensor(1e-3, device=device) if on_gpu else 1e-3
    optimizer = torch.optim.AdamW(
        policy.get_optim_params(), lr=rate, weight_decay=1e-6, fused=True, capturable=on_gpu
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, budget.learning_rate, total_steps=max(budget.steps, 10),
        cycle_momentum=not on_gpu,  # a CUDA graph keeps the momentum that it was recorded with
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weights = list(policy.diffusion.parameters())
    averaged: list[Tensor] = []

    def drawn() -> Batch:
        index = frames[torch.randint(len(frames), (budget.batch_size,), generator=generator)]
        return windows.batch(index, augment=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        # The stock forward pass: ours also takes figures for the log, which reads from the GPU.
        loss, _ = DiffusionPolicy.forward(policy, batch)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            if budget.ema and not averaged:
                averaged.extend(weight.clone() for weight in weights)
            elif budget.ema:
                torch._foreach_lerp_(averaged, weights, 1 - budget.ema)

    take = Captured(step, drawn()) if on_gpu else step
    for _ in range(budget.steps):
        take(drawn())
        schedule.step()
    if averaged:
        with torch.no_grad():
            torch._foreach_copy_(weights, averaged)
    return policy.eval()


def denoised(policy: DiffusionLamPolicy, windows: Windows, frames: Tensor, budget: Budget) -> Tensor:
    """Actions (samples, B, n_action_steps, D) from the same noise for every policy."""
    generator = torch.Generator().manual_seed(1)
    shape = (budget.noise_samples, len(frames), budget.horizon, windows.columns[ACTION].shape[1])
    noise = torch.randn(shape, generator=generator)
    samples, device = [], policy.config.device
    for sample in noise:
        parts = []
        for index, start in zip(frames.split(512), sample.split(512), strict=True):
            found = windows.batch(index)
            batch = {key: value.to(device) for key, value in found.items() if key.startswith("obs")}
            parts.append(policy.predict_action_chunk(batch, noise=start.to(device)).cpu())
        samples.append(torch.cat(parts))
    return torch.stack(samples)


def errors(
    policy: DiffusionLamPolicy, windows: Windows, budget: Budget, frames: Tensor
) -> dict[str, list[float]]:
    """Mean squared error of denoised actions in each episode of the frames, on the normalised scale.

    Returns:
        `error`: of single samples, averaged; `error_of_mean`: of the samples' mean.
    """
    data = windows.data
    actions = denoised(policy, windows, frames, budget)
    wanted, is_pad = data.window(frames, list(range(budget.n_action_steps)))
    true = windows.columns[ACTION][wanted]
    found = {}
    for name, predicted in {"error": actions, "error_of_mean": actions.mean(0, keepdim=True)}.items():
        square = (predicted - true).square().mean((0, 3)).masked_fill(is_pad, 0.0)  # (B, n_action_steps)
        per_frame = square.sum(1) / (~is_pad).sum(1)
        episodes = data.episode[frames]
        found[name] = [float(per_frame[episodes == e].mean()) for e in episodes.unique()]
    return found


def run(
    data: Recorded, tokens: Tokens | None, offsets: tuple[int, ...], n_obs_steps: int, frames: Tensor,
    budget: Budget, seed: int, kind: type[Windows] = Windows,
) -> dict[str, Any]:  # fmt: skip
    """Train and measure once."""
    started = time.process_time()
    windows = kind(data, n_obs_steps, budget.horizon, tokens, offsets)
    policy = train(windows, frames, budget, seed)
    found: dict[str, Any] = errors(policy, windows, budget, data.held_out_frames[:: budget.every])
    found["cpu_seconds"] = round(time.process_time() - started, 1)
    found["mean"] = float(np.mean(found["error"]))
    return found
