"""Diffusion Policy conditioned on LAM tokens.

    batch["index"] ─► TokenStore.window ┐
    native column, LamTokenDataset ─────┼► tokens (B, T, n·a) ─► lam_projection ─► every residual block's
    raw frames ─► LAM (policy/live.py) ─┤                                          conditioning, added
    deployed (policy/rollout.py) ───────┘

With several sources (cameras, LAMs), their tokens are concatenated, and n·a is the sum over the sources.

The stock U-Net is built unchanged, and each residual block's conditioning layer gets a second linear layer,
initialised to zero: `linear(cond) + linear_lam(lam)`. So a fresh policy has the stock loss bit for bit, the
random number stream is untouched, and a stock checkpoint loads unchanged. (A single wider matrix with zero
columns would not be bit-exact, because the order of summation changes.)
"""

import logging
from collections import deque
from typing import Any

import torch
from lerobot.policies.diffusion.modeling_diffusion import (
    DiffusionConditionalResidualBlock1d,
    DiffusionModel,
    DiffusionPolicy,
)
from lerobot.utils.constants import ACTION, OBS_PREFIX
from lerobot.utils.import_utils import require_package
from safetensors.torch import load_file
from torch import Tensor, nn

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.constants import OBS_LAM_CAMERAS, OBS_LAM_IMAGES, OBS_LAM_TOKENS
from lerobot_lam_diffusion.policy.cameras import may_be_exchanged
from lerobot_lam_diffusion.policy.checkpoints import load_stock_weights, load_weights, plain
from lerobot_lam_diffusion.policy.guidance import open_guide, warn_of_missing_guide
from lerobot_lam_diffusion.policy.lams import resolve_live_sources, warn_of_another_rate
from lerobot_lam_diffusion.policy.live import LiveTokens
from lerobot_lam_diffusion.policy.model_card import add_lam_section
from lerobot_lam_diffusion.policy.precomputed import (
    resolve_first_batch,
    resolve_precomputed_sources,
    warn_of_pauses,
)
from lerobot_lam_diffusion.policy.rollout import Rollout
from lerobot_lam_diffusion.policy.streaming import is_streamed, refuse_wrong_streaming
from lerobot_lam_diffusion.policy.tick_clock import drives_a_robot
from lerobot_lam_diffusion.policy.training_figures import TrainingFigures
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.batch import check_batch
from lerobot_lam_diffusion.tokens.joined import JoinedStores
from lerobot_lam_diffusion.utils.errors import LamNotFoundError, TokenStoreError, TrainingError

logger = logging.getLogger(__name__)

__all__ = ["OBS_LAM_IMAGES", "OBS_LAM_TOKENS", "DiffusionLamModel", "DiffusionLamPolicy"]


class DiffusionLamPolicy(DiffusionPolicy):
    """`DiffusionPolicy` that also sees motion, as LAM tokens.

    Args:
        config: Policy configuration. In training, the metadata of the token stores or LAMs is written into
            it.
        dataset_meta: Metadata of the training dataset, as LeRobot's `make_policy` passes it. The token
            stores are checked against it here, before the first step.

    Attributes:
        token_store: Store in which precomputed tokens are looked up by frame index; None if they come from
            elsewhere.
        live_tokens: Computes tokens from frames; loads the LAMs on first use.
        rollout: Provides the tokens at deployment.

    Raises:
        UserError: the token sources are missing or contradict each other.
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
        if config.init_from_stock is not None and config.pretrained_path:
            raise TrainingError(
                f"--policy.init_from_stock={config.init_from_stock} and --policy.path="
                f"{config.pretrained_path} are two places to start from; leave one out"
            )
        self._figures = TrainingFigures()
        self.token_store: TokenStore | JoinedStores | None = None
        self.live_tokens = LiveTokens(config)
        self._unresolved_meta: Any = None  # of the training dataset, until the first batch shows its cameras
        self._unstreamed_meta: Any = None  # of the training dataset, until a batch of it is streamed
        guide = None
        if config.use_lam_conditioning:
            self._unresolved_meta = self._unstreamed_meta = dataset_meta
            self._given_sources = config.token_sources
            if dataset_meta is not None:
                warn_of_another_rate(config, dataset_meta)
                config.lam_fps = float(dataset_meta.fps)
                warn_of_pauses(dataset_meta)
            if config.use_precomputed_lam_tokens:
                self.token_store = resolve_precomputed_sources(config, dataset_meta)
            else:
                self._resolve_live_sources(dataset_meta)
            if dataset_meta is not None:
                warn_of_missing_guide(config)
            if config.lam_guidance is not None:
                guide = open_guide(config)
                config.lam_guidance = None  # no checkpoint carries it
        self.rollout = Rollout(config, self.live_tokens, guide)
        self.diffusion = DiffusionLamModel(config)
        if config.init_from_stock is not None:
            load_stock_weights(self, config, config.init_from_stock, self._lam_parameters())
            logger.info("Started from the stock policy %s.", config.init_from_stock)
            config.init_from_stock = None
        self.diffusion.lam_model = self.live_tokens.loaded
        self.reset()

    def _resolve_live_sources(self, dataset_meta: Any) -> None:
        """Open the LAMs now, so that a wrong one fails early; a trained policy may be given its tokens."""
        config = self.config
        trained = dataset_meta is None and config.lam_source is not None
        if trained and not config.past_token_deltas:
            return  # a guide gives its tokens
        try:
            models = [live.model for live in self.live_tokens.lams]
        except LamNotFoundError:
            if not trained:
                raise
            return
        resolve_live_sources(config, dataset_meta, models)
        if dataset_meta is not None and not may_be_exchanged(config, dataset_meta):
            self._open_caches(dataset_meta)  # else the first batch shows the cameras

    def _open_caches(self, dataset_meta: Any, names: dict[str, str] | None = None) -> None:
        """Open the cache of each source's tokens, if `lam_live_cache` asks for it."""
        if self.config.lam_live_cache is not None and not self.config.use_precomputed_lam_tokens:
            from lerobot_lam_diffusion.policy.live_cache import open_live_caches  # imports precompute

            models = [live.model for live in self.live_tokens.lams]
            self.live_tokens.use_caches(open_live_caches(self.config, dataset_meta, models, names))

    def _resolve_first_batch(self, batch: dict[str, Any]) -> None:
        """Once, before the first training step: make sure that the tokens come from the policy's camera."""
        config, meta = self.config, self._unresolved_meta
        if meta is None:
            return
        self.token_store = resolve_first_batch(config, self.token_store, meta, batch, self._given_sources)
        if may_be_exchanged(config, meta):
            self._open_caches(meta, batch.get(OBS_LAM_CAMERAS))
        if self.token_store is not None and config.lam_tokens_key in batch and "index" in batch:
            self._compare_with_store(self.token_store, batch)
        self._unresolved_meta = None

    def _compare_with_store(self, store: TokenStore | JoinedStores, batch: dict[str, Any]) -> None:
        """Warn if a batch's own tokens differ from the store's; zeros are ignored, as they may be masked."""
        own, deltas = self._window_tokens(batch), self.config.lam_token_deltas
        try:
            stored = self._stored_tokens(store, batch).to(own)
        except TokenStoreError:
            return  # frames that this store knows nothing of
        if ((own != stored) & (own != 0)).any():
            logger.warning(
                "The batch's LAM tokens %r are not those of token store %s at the frame offsets %s, which "
                "the policy sees when it acts. Join them by LamTokenDataset(dataset, store, "
                "config.lam_token_deltas), or leave them out of the batch.",
                self.config.lam_tokens_key,
                store.name,
                deltas,
            )

    def reset(self) -> None:
        super().reset()
        self.rollout.reset()
        if self.config.use_lam_conditioning:
            self._queues[OBS_LAM_TOKENS] = deque(maxlen=len(self.config.lam_token_deltas))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float] | None]:
        """Loss of a training batch, and in training what `lerobot-train` logs (see `training_figures`).

        Args:
            batch: A batch of the stock policy plus one of: LAM tokens `(B, T, n·a)` under `lam_tokens_key`,
                with T at least `lam_conditioning_steps` (the last ones are used); `index` `(B,)`, to look
                them up in the store; raw frames from the pre-processor, to compute them on the fly.
        """
        if self._unstreamed_meta is not None and is_streamed(batch):
            refuse_wrong_streaming(self.config, self._unstreamed_meta)
            self._unstreamed_meta = None
        batch = self._with_window_tokens(batch)
        if not (self.config.use_lam_conditioning and self.training and torch.is_grad_enabled()):
            return super().forward(batch)
        layers = self.diffusion.conditioning_layers()
        return self._figures.loss(self, batch, OBS_LAM_TOKENS, layers, super().forward)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Actions `(B, n_action_steps, action_dim)`, from the queues or, while they are empty, the batch.

        A guided policy assumes that each chunk requested in this way is acted out before the next one.
        """
        if self.config.use_lam_conditioning and not any(self._queues.values()):
            if self.config.future_token_deltas and not {self.config.lam_tokens_key, "index"} & batch.keys():
                batch = {**batch, OBS_LAM_TOKENS: self.rollout.chunk(batch)}
            else:
                if self._lacks_tokens(batch):
                    zeros = self.rollout.zeros(batch, len(self.config.lam_token_deltas))
                    batch = {**batch, self.config.lam_tokens_key: zeros}
                batch = self._with_window_tokens(batch)
        return super().predict_action_chunk(batch, noise=noise)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """One action `(B, action_dim)`.

        The batch's own tokens under `lam_tokens_key` are used if present: this tick's `(B, n·a)` or, with
        `lam_token_offsets`, those of all offsets `(B, lam_conditioning_steps, n·a)`. Otherwise, when a new
        chunk of actions is predicted, the LAM computes the tokens of offsets up to 0 from the frames seen
        since `reset()`, and the guide supplies those above 0.
        """
        if self.config.use_lam_conditioning:
            tokens = self.rollout.tick(batch, predicts=not self._queues[ACTION])
            self.diffusion.lam_model = self.live_tokens.loaded
            if tokens is not None and tokens.ndim == 3:  # a whole window: all but the newest into the queue
                queue = self._queues[OBS_LAM_TOKENS]
                queue.clear()
                queue.extend(tokens[:, :-1].unbind(1))
                tokens = tokens[:, -1]
            if tokens is not None:
                batch = {**batch, OBS_LAM_TOKENS: tokens}
        return super().select_action(batch, noise=noise)

    def _lacks_tokens(self, batch: dict[str, Any]) -> bool:
        """Whether there are no tokens for a batch, and the user wants to act without."""
        config = self.config
        if config.lam_missing != "zero" or config.lam_tokens_key in batch:
            return False
        return self.token_store is None if config.use_precomputed_lam_tokens else not self.rollout.has_lam()

    def _with_window_tokens(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its conditioning tokens `(B, lam_conditioning_steps, n·a)` under a fixed key."""
        if not self.config.use_lam_conditioning:
            return batch
        self._resolve_first_batch(batch)
        tokens = self._window_tokens(batch)
        if self.training and self.config.lam_token_dropout:
            tokens = drop_tokens(tokens, self.config.lam_token_dropout)
        return {**self._last_observations(batch), OBS_LAM_TOKENS: tokens}

    def _window_tokens(self, batch: dict[str, Any]) -> Tensor:
        config, key = self.config, self.config.lam_tokens_key
        deltas, token_dim = config.lam_token_deltas, config.lam_token_dim
        steps = len(deltas)
        if key in batch:
            tokens = batch[key]
        elif not config.use_precomputed_lam_tokens:
            tokens = self.live_tokens.window(batch)
        elif "index" not in batch or self.token_store is None:
            lacking = "this policy has no token store open" if "index" in batch else "it has no 'index'"
            raise TrainingError(
                f"the batch has no LAM tokens under {key!r}, and they cannot be looked up, as {lacking}: "
                "wrap the dataset in LamTokenDataset, or build the policy with LeRobot's make_policy and "
                "--policy.lam_tokens_path"
            )
        else:
            tokens = self._stored_tokens(self.token_store, batch)
        if tokens.ndim == 2:  # one observation step without a time axis
            tokens = tokens.unsqueeze(1)
        # A longer window of the past is trimmed; other offsets must be met exactly.
        trims = deltas == list(range(1 - steps, 1))
        is_window = tokens.ndim == 3 and (tokens.shape[1] == steps or (trims and tokens.shape[1] > steps))
        if not is_window or tokens.shape[2] != token_dim:
            at_least = "at least " * trims
            raise TrainingError(
                f"LAM tokens {key!r} have shape {tuple(tokens.shape)}, expected (B, {at_least}{steps}, "
                f"{token_dim}) = (batch, frame offsets {deltas}, lam_num_learned_tokens * "
                "lam_action_latent_dim): LamTokenDataset(dataset, store, config.lam_token_deltas) joins them"
            )
        return tokens[:, -steps:]

    def _stored_tokens(self, store: TokenStore | JoinedStores, batch: dict[str, Any]) -> Tensor:
        deltas = self.config.lam_token_deltas
        check_batch(store, batch)
        return store.window(batch["index"], deltas, ahead=max(deltas) > 0)

    def _last_observations(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Drop the frames that only the LAM needs: keep the last `n_obs_steps` of every observation."""
        delivered = self.config.observation_delta_indices
        window = len(delivered)
        if window == self.config.n_obs_steps:
            return batch
        kept = slice(delivered.index(1 - self.config.n_obs_steps), delivered.index(0) + 1)

        def is_window(key: str, value: Any) -> bool:
            is_observation = key.startswith(OBS_PREFIX) and isinstance(value, Tensor)
            return is_observation and value.ndim > 1 and value.shape[1] == window

        return {key: value[:, kept] if is_window(key, value) else value for key, value in batch.items()}

    def generate_model_card(self, *args: Any, dataset_meta: Any = None, **kwargs: Any) -> Any:
        """LeRobot's card, and which tokens the policy was trained with."""
        card = super().generate_model_card(*args, dataset_meta=dataset_meta, **kwargs)
        if self.config.use_lam_conditioning:
            add_lam_section(card, self.config, None if dataset_meta is None else dataset_meta.fps)
        return card

    def _lam_parameters(self) -> set[str]:
        """Plain names of the parameters that a stock Diffusion Policy does not have."""
        names = {plain(name) for name, _ in self.named_parameters()}
        return {name for name in names if "lam_projection" in name or "cond_encoder.lam." in name}

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """What `lerobot-train --peft.method_type=…` adapts: the layers by which the U-Net is conditioned."""
        lam = r"|cond_encoder\.lam|lam_projection" if self.config.use_lam_conditioning else ""
        return {"target_modules": rf".*\.(cond_encoder\.1|diffusion_step_encoder\.[13]{lam})"}

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: Any, *, config: Any = None, **kwargs: Any
    ) -> "DiffusionLamPolicy":
        """Load the policy as LeRobot does; for deployment also open the LAMs, so that a bad one fails early.

        For deployment, LeRobot's commands pass a config but no dataset, before they connect to a robot.
        """
        policy = super().from_pretrained(pretrained_name_or_path, config=config, **kwargs)
        deployed = config is not None and config.pretrained_path and kwargs.get("dataset_meta") is None
        if not deployed or not config.use_lam_conditioning:
            return policy
        if config.lam_missing == "zero":
            policy.rollout.has_lam()
        else:
            try:
                _ = policy.live_tokens.lams
            except LamNotFoundError as error:
                if drives_a_robot():
                    raise
                logger.warning("%s. The first action needs it, unless the batch brings tokens.", error)
        if drives_a_robot() and policy.live_tokens.loaded is not None and config.past_token_deltas:
            policy.live_tokens.warm_up()
        policy.diffusion.lam_model = policy.live_tokens.loaded
        return policy

    @classmethod
    def _load_as_safetensor(
        cls, model: "DiffusionLamPolicy", model_file: str, map_location: str, strict: bool
    ) -> "DiffusionLamPolicy":
        load_weights(model, load_file(model_file), model_file)  # always strict, whatever `strict` says
        return model


class DiffusionLamModel(DiffusionModel):
    """`DiffusionModel` conditioned on LAM tokens; without LAM conditioning, exactly that model.

    Attributes:
        lam_model: The LAM if tokens are computed live (a tuple if the policy has several sources of tokens),
            else None. Not an `nn.Module`.
        lam_projection: Bias-free linear layer `n·a -> n·a`, initialised to the identity: a missing token
            (zero) stays zero and adds nothing.
    """

    config: DiffusionLamConfig

    def __init__(self, config: DiffusionLamConfig) -> None:
        super().__init__(config)
        self.lam_model: Any = None
        if config.use_lam_conditioning:
            self.lam_projection = _linear_without_rng(config.lam_token_dim, config.lam_token_dim)
            nn.init.eye_(self.lam_projection.weight)
            for block in list(self.unet.modules()):  # a list: the blocks change while we walk them
                if isinstance(block, DiffusionConditionalResidualBlock1d):
                    block.cond_encoder = LamCondEncoder(block.cond_encoder, config.lam_conditioning_dim)

    def conditioning_layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """Stock and LAM linear layers of each residual block; none for a compiled U-Net: it has no hooks."""
        if hasattr(self.unet, "_orig_mod"):
            return []
        return [(layer[1], layer.lam) for layer in self.unet.modules() if isinstance(layer, LamCondEncoder)]

    def _prepare_global_conditioning(self, batch: dict[str, Tensor]) -> Tensor:
        """Stock conditioning `(B, global_cond_dim)`, then the LAM's `(B, lam_conditioning_dim)`."""
        global_cond = super()._prepare_global_conditioning(batch)
        if not self.config.use_lam_conditioning:
            return global_cond
        tokens = self._scaled(batch[OBS_LAM_TOKENS])  # (B, steps, n·a)
        lam = self.lam_projection(tokens).flatten(start_dim=1)
        return torch.cat([global_cond, lam], dim=-1)

    def _scaled(self, tokens: Tensor) -> Tensor:
        """Each source's part of tokens `(…, n·a)` divided by that source's scale."""
        sources = self.config.token_sources
        parts = tokens.split([source.token_dim for source in sources], dim=-1)
        scaled = [part / (source.token_scale or 1.0) for source, part in zip(sources, parts, strict=True)]
        return torch.cat(scaled, dim=-1)


class LamCondEncoder(nn.Sequential):
    """A residual block's stock conditioning layer (Mish, Linear) plus a linear of the LAM vector.

    Keeps the stock layer's parameter names (`cond_encoder.1.weight`); its own are `cond_encoder.lam.weight`.
    The LAM vector bypasses the Mish, which would flatten the sign of a motion.
    """

    def __init__(self, stock: nn.Sequential, lam_dim: int) -> None:
        super().__init__(*stock)
        linear = stock[-1]
        assert isinstance(linear, nn.Linear)
        self.lam = _linear_without_rng(lam_dim, linear.out_features)
        nn.init.zeros_(self.lam.weight)

    def forward(self, cond: Tensor) -> Tensor:
        """`(B, cond_dim + lam_dim)` -> `(B, cond_channels)`."""
        mish, linear = self[0], self[1]
        stock, lam = cond.split([linear.in_features, self.lam.in_features], dim=-1)
        # contiguous: the same memory layout as in the stock model, hence the same bits.
        return linear(mish(stock.contiguous())) + self.lam(lam)


def drop_tokens(tokens: Tensor, probability: float) -> Tensor:
    """Zero whole windows with `probability`, and in the others each token with the same `probability`.

    At 0.5 this is the masking with which villa-X trains its actor. Tokens are `(B, T, n·a)`.
    """
    whole = torch.rand(len(tokens), 1, 1, device=tokens.device) < probability
    each = torch.rand(*tokens.shape[:2], 1, device=tokens.device) < probability
    return tokens.masked_fill(whole | each, 0.0)


def _linear_without_rng(in_features: int, out_features: int) -> nn.Linear:
    """A bias-free linear that draws no random numbers."""
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False)
