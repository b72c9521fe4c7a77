"""Diffusion Policy conditioned on LAM tokens.

    batch["index"] ─► TokenStore.window ┐
    native column, LamTokenDataset ─────┴► tokens (B, T, n·a) ─► lam_projection ─► every residual block's
                                                                                   conditioning, added

The stock U-Net is built as it is, and each residual block's conditioning layer gets a second linear, zero at
the start: `linear(cond) + linear_lam(lam)`. So a fresh policy gives the stock loss bit for bit, the random
number stream is untouched, and a stock checkpoint fits in unchanged. (One wider matrix with zero columns
would not be bit-exact: the order of summation changes.)
"""

from collections import deque
from typing import Any

import torch
from lerobot.policies.diffusion.modeling_diffusion import (
    DiffusionConditionalResidualBlock1d,
    DiffusionModel,
    DiffusionPolicy,
)
from lerobot.utils.import_utils import require_package
from torch import Tensor, nn

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.constants import OBS_LAM_IMAGES, OBS_LAM_TOKENS
from lerobot_lam_diffusion.token_source import settle_precomputed_source
from lerobot_lam_diffusion.tokens import TokenStore

__all__ = ["OBS_LAM_IMAGES", "OBS_LAM_TOKENS", "DiffusionLamModel", "DiffusionLamPolicy"]


class DiffusionLamPolicy(DiffusionPolicy):
    """`DiffusionPolicy` that also sees motion, as LAM tokens.

    Args:
        config: Policy configuration. In training, what the token store says about its LAM is written into it.
        dataset_meta: Metadata of the training dataset, as LeRobot's `make_policy` passes it. The token
            store is checked against it here, before the first step.

    Raises:
        ValueError: no or contradictory sources of tokens (see `token_source`).
    """

    config_class = DiffusionLamConfig
    name = "diffusion_lam"
    config: DiffusionLamConfig
    diffusion: "DiffusionLamModel"

    def __init__(self, config: DiffusionLamConfig, dataset_meta: Any = None, **kwargs: Any) -> None:
        require_package("diffusers", extra="diffusion")
        # Past DiffusionPolicy.__init__, which would build a stock model first: only one U-Net is ever made.
        super(DiffusionPolicy, self).__init__(config)
        config.validate_features()
        self.token_store: TokenStore | None = None
        if config.use_lam_conditioning and config.use_precomputed_lam_tokens:
            self.token_store = settle_precomputed_source(config, dataset_meta)
        self.diffusion = DiffusionLamModel(config)
        self.reset()

    def reset(self) -> None:
        super().reset()
        if self.config.use_lam_conditioning:
            self._queues[OBS_LAM_TOKENS] = deque(maxlen=len(self.config.lam_token_deltas))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        """Loss of a training batch.

        Args:
            batch: As stock diffusion's, and LAM tokens `(B, T, n·a)` under `lam_tokens_key`, T at least
                `lam_conditioning_steps` (the last ones count), or `index` `(B,)` to find them in the store.
        """
        return super().forward(self._with_window_tokens(batch))

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Actions `(B, n_action_steps, action_dim)`, from the queues or, while they are empty, the batch."""
        if not any(self._queues.values()):
            batch = self._with_window_tokens(batch)
        return super().predict_action_chunk(batch, noise=noise)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """One action `(B, action_dim)`; the batch brings the tick's token `(B, n·a)`, `lam_tokens_key`."""
        if self.config.use_lam_conditioning:
            key = self.config.lam_tokens_key
            if key not in batch:
                raise ValueError(
                    f"this diffusion_lam policy needs the LAM token of each observation, and the batch has "
                    f"no {key!r} (it has {sorted(batch)}). Deployment without tokens in the batch is not "
                    "supported yet"
                )
            batch = {**batch, OBS_LAM_TOKENS: batch[key]}
        return super().select_action(batch, noise=noise)

    def _with_window_tokens(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with its conditioning tokens `(B, lam_conditioning_steps, n·a)` under a fixed key."""
        if not self.config.use_lam_conditioning:
            return batch
        return {**batch, OBS_LAM_TOKENS: self._window_tokens(batch)}

    def _window_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        key, deltas = self.config.lam_tokens_key, self.config.lam_token_deltas
        if key in batch:
            tokens = batch[key]
        elif "index" in batch:
            tokens = self._opened_store().window(batch["index"], deltas)
        else:
            raise ValueError(
                f"the batch has neither LAM tokens under {key!r} nor frame indices under 'index' to find "
                f"them by (it has {sorted(batch)})"
            )
        if tokens.ndim == 2:  # one observation step without a time axis
            tokens = tokens.unsqueeze(1)
        steps = len(deltas)
        if tokens.ndim != 3 or tokens.shape[1] < steps or tokens.shape[2] != self.config.lam_token_dim:
            raise ValueError(
                f"LAM tokens {key!r} have shape {tuple(tokens.shape)}, expected (B, at least {steps}, "
                f"{self.config.lam_token_dim}) = (batch, lam_conditioning_steps, lam_num_learned_tokens * "
                "lam_action_latent_dim)"
            )
        return tokens[:, -steps:]

    def _opened_store(self) -> TokenStore:
        if self.token_store is None:
            raise ValueError(
                f"the batch has no LAM tokens under {self.config.lam_tokens_key!r} and this policy has no "
                "token store open: wrap the dataset in LamTokenDataset, or build the policy with LeRobot's "
                "make_policy and --policy.lam_tokens_path"
            )
        return self.token_store


class DiffusionLamModel(DiffusionModel):
    """`DiffusionModel` whose conditioning takes LAM tokens, or exactly that model without them.

    Attributes:
        lam_model: The LAM, where tokens are computed live; None otherwise.
        lam_projection: Linear `n·a -> n·a` without bias, the identity at the start: a missing token, zero,
            stays zero and adds nothing.
    """

    config: DiffusionLamConfig

    def __init__(self, config: DiffusionLamConfig) -> None:
        super().__init__(config)
        self.lam_model = None
        if config.use_lam_conditioning:
            self.lam_projection = _linear_without_drawing(config.lam_token_dim, config.lam_token_dim)
            nn.init.eye_(self.lam_projection.weight)
            for block in list(self.unet.modules()):  # a list: the blocks change while we walk them
                if isinstance(block, DiffusionConditionalResidualBlock1d):
                    block.cond_encoder = LamCondEncoder(block.cond_encoder, config.lam_conditioning_dim)

    def _prepare_global_conditioning(self, batch: dict[str, Tensor]) -> Tensor:
        """Stock conditioning `(B, global_cond_dim)`, then the LAM's `(B, lam_conditioning_dim)`."""
        global_cond = super()._prepare_global_conditioning(batch)
        if not self.config.use_lam_conditioning:
            return global_cond
        tokens = batch[OBS_LAM_TOKENS] / (self.config.lam_token_scale or 1.0)  # (B, steps, n·a)
        lam = self.lam_projection(tokens).flatten(start_dim=1)
        return torch.cat([global_cond, lam], dim=-1)


class LamCondEncoder(nn.Sequential):
    """A residual block's stock conditioning layer (Mish, Linear) plus a linear of the LAM vector.

    Keeps the stock layer's parameter names (`cond_encoder.1.weight`); its own are `cond_encoder.lam.weight`.
    The LAM vector goes past the Mish, which would flatten the sign of a motion.
    """

    def __init__(self, stock: nn.Sequential, lam_dim: int) -> None:
        super().__init__(*stock)
        linear = stock[-1]
        assert isinstance(linear, nn.Linear)
        self.lam = _linear_without_drawing(lam_dim, linear.out_features)
        nn.init.zeros_(self.lam.weight)

    def forward(self, cond: Tensor) -> Tensor:
        """`(B, cond_dim + lam_dim)` -> `(B, cond_channels)`."""
        mish, linear = self[0], self[1]
        stock, lam = cond.split([linear.in_features, self.lam.in_features], dim=-1)
        # contiguous: the same memory layout as in the stock model, hence the same bits.
        return linear(mish(stock.contiguous())) + self.lam(lam)


def _linear_without_drawing(in_features: int, out_features: int) -> nn.Linear:
    """A bias-free linear whose construction leaves the random number stream as it is."""
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False)
