"""One trainer, one measure: the package's own policy on tensors in memory."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lerobot_lam_diffusion import DiffusionLamConfig, DiffusionLamPolicy

from .data import ACTION, ENV, STATE, Recorded
from .lams import Tokens

FEATURE_TYPES = {STATE: FeatureType.STATE, ENV: FeatureType.ENV}


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

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        acted, is_pad = self.data.window(index, self.acted)
        observed, _ = self.data.window(index, self.observed)
        batch = {key: values[observed] for key, values in self.columns.items() if key != ACTION}
        batch |= {ACTION: self.columns[ACTION][acted], "action_is_pad": is_pad}
        if self.tokens is not None:
            batch["observation.lam_tokens"] = self.tokens.store.window(
                index, self.offsets, ahead=max(self.offsets) > 0
            )
        return batch


def config_of(windows: Windows, budget: Budget) -> DiffusionLamConfig:
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
        input_features={
            key: PolicyFeature(FEATURE_TYPES[key], (values.shape[1],))
            for key, values in columns.items()
            if key != ACTION
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (columns[ACTION].shape[1],))},
        device="cpu", push_to_hub=False, pretrained_backbone_weights=None, crop_shape=None,
        n_obs_steps=len(windows.observed), horizon=budget.horizon, n_action_steps=budget.n_action_steps,
        down_dims=budget.down_dims, diffusion_step_embed_dim=32,
        noise_scheduler_type="DDIM", num_inference_steps=10, **lam,
    )  # fmt: skip


def train(windows: Windows, frames: Tensor, budget: Budget, seed: int) -> DiffusionLamPolicy:
    """A policy trained on the given frames; the seed decides weights, batches and noise."""
    torch.manual_seed(seed)
    policy = DiffusionLamPolicy(config_of(windows, budget)).train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, budget.learning_rate, total_steps=max(budget.steps, 10)
    )
    generator = torch.Generator().manual_seed(seed)
    averaged = budget.ema and AveragedModel(policy.diffusion, multi_avg_fn=get_ema_multi_avg_fn(budget.ema))
    for _ in range(budget.steps):
        index = frames[torch.randint(len(frames), (budget.batch_size,), generator=generator)]
        loss, _ = policy.forward(windows.batch(index))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if averaged:
            averaged.update_parameters(policy.diffusion)
    if averaged:
        policy.diffusion.load_state_dict(averaged.module.state_dict())
    return policy.eval()


def denoised(policy: DiffusionLamPolicy, windows: Windows, frames: Tensor, budget: Budget) -> Tensor:
    """Actions (samples, B, n_action_steps, D) from the same noise for every policy."""
    generator = torch.Generator().manual_seed(1)
    shape = (budget.noise_samples, len(frames), budget.horizon, windows.columns[ACTION].shape[1])
    noise = torch.randn(shape, generator=generator)
    samples = []
    for sample in noise:
        parts = []
        for index, start in zip(frames.split(512), sample.split(512), strict=True):
            batch = {key: value for key, value in windows.batch(index).items() if key.startswith("obs")}
            parts.append(policy.predict_action_chunk(batch, noise=start))
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
    budget: Budget, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Train and measure once."""
    started = time.process_time()
    windows = Windows(data, n_obs_steps, budget.horizon, tokens, offsets)
    policy = train(windows, frames, budget, seed)
    found: dict[str, Any] = errors(policy, windows, budget, data.held_out_frames[:: budget.every])
    found["cpu_seconds"] = round(time.process_time() - started, 1)
    found["mean"] = float(np.mean(found["error"]))
    return found
