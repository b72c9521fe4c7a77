"""Diffusion Policy conditioned on LAM tokens.

    batch["index"] ─► TokenStore.window ┐
    native column, LamTokenDataset ─────┼► tokens (B, T, n·a) ─► lam_projection ─► every residual block's
    raw frames ─► LAM (live_tokens.py) ─┤                                          conditioning, added
    deployed: video ─► LAM (guidance) ──┘

Of several sources (cameras, LAMs) the tokens stand side by side: n·a is then the sum over them.

The stock U-Net is built as it is, and each residual block's conditioning layer gets a second linear, zero at
the start: `linear(cond) + linear_lam(lam)`. So a fresh policy gives the stock loss bit for bit, the random
number stream is untouched, and a stock checkpoint fits in unchanged. (One wider matrix with zero columns
would not be bit-exact: the order of summation changes.)
"""

import logging
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from lerobot.policies.diffusion.modeling_diffusion import (
    DiffusionConditionalResidualBlock1d,
    DiffusionModel,
    DiffusionPolicy,
)
from lerobot.utils.constants import ACTION, OBS_PREFIX, OBS_STATE
from lerobot.utils.import_utils import require_package
from safetensors.torch import load_file
from torch import Tensor, nn

from lerobot_lam_diffusion.camera_names import may_be_exchanged
from lerobot_lam_diffusion.checkpoint_weights import load_stock_weights, load_weights, plain
from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.constants import OBS_LAM_CAMERAS, OBS_LAM_IMAGES, OBS_LAM_TOKENS
from lerobot_lam_diffusion.model_card import add_lam_section
from lerobot_lam_diffusion.problems import DatasetError, LamNotFoundError, TrainingError
from lerobot_lam_diffusion.streaming import StreamingGuard
from lerobot_lam_diffusion.tick_clock import TickClock, drives_a_robot
from lerobot_lam_diffusion.token_source import (
    settle_first_batch,
    settle_live_source,
    settle_precomputed_source,
    warn_of_missing_guide,
    warn_of_pauses,
)
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.batch import check_batch
from lerobot_lam_diffusion.tokens.joined import JoinedStores
from lerobot_lam_diffusion.training_figures import TrainingFigures

if TYPE_CHECKING:  # training on precomputed tokens imports no LAM
    from lerobot_lam_diffusion.live_tokens import FrameHistory, LiveTokens
    from lerobot_lam_diffusion.policy.guidance import Guide

logger = logging.getLogger(__name__)

__all__ = ["OBS_LAM_IMAGES", "OBS_LAM_TOKENS", "DiffusionLamModel", "DiffusionLamPolicy"]


class DiffusionLamPolicy(DiffusionPolicy):
    """`DiffusionPolicy` that also sees motion, as LAM tokens.

    Args:
        config: Policy configuration. In training, what the token stores or the LAMs say about themselves is
            written into it.
        dataset_meta: Metadata of the training dataset, as LeRobot's `make_policy` passes it. The token
            stores are checked against it here, before the first step.

    Raises:
        UserError: no or contradictory sources of tokens (see `token_source`).
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
                f"{config.pretrained_path} are two starts; leave one out"
            )
        self._streaming = StreamingGuard(config, dataset_meta)
        self._figures = TrainingFigures()
        self.token_store: TokenStore | JoinedStores | None = None
        self._live_tokens: LiveTokens | None = None
        self._clock = TickClock(config)
        self._frame_sizes_seen = False
        self._dataset_meta = dataset_meta if config.use_lam_conditioning else None  # until the first batch
        self._given_sources = config.token_sources if config.use_lam_conditioning else []
        if self._dataset_meta is not None:
            config.lam_fps = float(dataset_meta.fps)
            warn_of_pauses(dataset_meta)
        self.guide: Guide | None = None
        if config.use_lam_conditioning and config.use_precomputed_lam_tokens:
            self.token_store = settle_precomputed_source(config, dataset_meta)
        elif config.use_lam_conditioning:
            self._settle_live_source(dataset_meta)
        if config.use_lam_conditioning:
            self._open_guide(dataset_meta)
        self.diffusion = DiffusionLamModel(config)
        if config.init_from_stock is not None:
            load_stock_weights(self, config, config.init_from_stock, self._lam_parameters())
            logger.info("Started from the stock policy %s.", config.init_from_stock)
            config.init_from_stock = None
        if self._live_tokens is not None and self._live_tokens.is_open:
            self.diffusion.lam_model = self._live_tokens.models
        self.reset()

    def _open_guide(self, dataset_meta: Any) -> None:
        """Open what `lam_guidance` names, and forget the name: no checkpoint carries it."""
        if dataset_meta is not None:
            warn_of_missing_guide(self.config)
        if self.config.lam_guidance is not None:
            from lerobot_lam_diffusion.policy.guidance import open_guide  # training needs none

            self.guide = open_guide(self.config)
            self.config.lam_guidance = None

    def _settle_live_source(self, dataset_meta: Any) -> None:
        """Open the LAMs now, so that a wrong one fails early; a trained policy may be given its tokens."""
        deployed = dataset_meta is None and self.config.lam_source is not None
        if deployed and not self.config.past_token_deltas:
            return  # a guide gives its tokens
        try:
            lams = [live.lam for live in self.live_tokens.lams]
        except LamNotFoundError:
            if dataset_meta is not None or self.config.lam_source is None:
                raise
        else:
            settle_live_source(self.config, dataset_meta, lams)
            if (
                self.config.lam_live_cache is not None
                and dataset_meta is not None
                and not may_be_exchanged(self.config, dataset_meta)  # then the first batch tells the cameras
            ):
                self.live_tokens.keep(dataset_meta)

    @property
    def live_tokens(self) -> "LiveTokens":
        """Tokens from frames; their LAMs are loaded when they are first needed."""
        if self._live_tokens is None:
            from lerobot_lam_diffusion.live_tokens import LiveTokens

            self._live_tokens = LiveTokens(self.config)
        return self._live_tokens

    def reset(self) -> None:
        super().reset()
        self._history: dict[str, FrameHistory] | None = None  # of each camera that a LAM looks at
        self._clock.reset()
        self._can_compute: bool | None = None  # whether there is a LAM; found out when it matters
        self._tick = 0  # of the rollout, and frame of the guide
        if self.config.use_lam_conditioning:
            self._queues[OBS_LAM_TOKENS] = deque(maxlen=len(self.config.lam_token_deltas))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float] | None]:
        """Loss of a training batch, and in training what `lerobot-train` logs (see `training_figures`).

        Args:
            batch: As stock diffusion's, and one of: LAM tokens `(B, T, n·a)` under `lam_tokens_key`, T at
                least `lam_conditioning_steps` (the last ones count); `index` `(B,)` to find them in the
                store; raw frames from the pre-processor, to compute them on the fly.
        """
        self._streaming.check(batch)
        batch = self._with_window_tokens(batch)
        if not (self.config.use_lam_conditioning and self.training and torch.is_grad_enabled()):
            return super().forward(batch)
        layers = self.diffusion.conditioning_layers()
        return self._figures.loss(self, batch, OBS_LAM_TOKENS, layers, super().forward)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Actions `(B, n_action_steps, action_dim)`, from the queues or, while they are empty, the batch.

        A guided policy takes each chunk that is asked for in this way to be acted out before the next one.
        """
        if not any(self._queues.values()):
            if self.config.future_token_deltas and not {self.config.lam_tokens_key, "index"} & batch.keys():
                batch = {**batch, OBS_LAM_TOKENS: self._window_at_tick(batch)}
                self._tick += self.config.n_action_steps
            else:
                batch = self._with_window_tokens(self._with_missing_tokens(batch))
        return super().predict_action_chunk(batch, noise=noise)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """One action `(B, action_dim)`.

        Tokens are the batch's own under `lam_tokens_key`: this tick's `(B, n·a)`, or with `lam_token_offsets`
        those of all offsets `(B, lam_conditioning_steps, n·a)`. Or else, when a new chunk of actions is
        predicted, the LAM computes those of offsets up to 0 from the frames seen since `reset()`, and the
        guide gives those above 0.
        """
        if self.config.use_lam_conditioning:
            batch = self._with_current_tokens(batch)
            self._tick += 1
        return super().select_action(batch, noise=noise)

    def _with_missing_tokens(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch of a chunk, with zeros where there are no tokens and the user wants to act without."""
        config = self.config
        if not config.use_lam_conditioning or config.lam_missing != "zero" or config.lam_tokens_key in batch:
            return batch
        is_at_hand = self.token_store is not None if config.use_precomputed_lam_tokens else self._computable()
        if is_at_hand:
            return batch
        state = batch[OBS_STATE]
        shape = (len(state), len(config.lam_token_deltas), config.lam_token_dim)
        return {**batch, config.lam_tokens_key: torch.zeros(shape, device=state.device)}

    def _settle_first_batch(self, batch: dict[str, Any]) -> None:
        """Before the first step of a training: the tokens are of the camera that the policy knows (once)."""
        meta = self._dataset_meta
        if meta is None:
            return
        names = batch.get(OBS_LAM_CAMERAS)
        exchanged = may_be_exchanged(self.config, meta)
        if (
            names is None
            and exchanged
            and (self.config.use_precomputed_lam_tokens or self.config.lam_live_cache)
        ):
            logger.warning(
                "The batch does not tell which of the dataset's cameras are which of the policy's (no %r: "
                "the pre-processor is not this policy's, or of a checkpoint of an earlier version). They are "
                "taken to have the same names; under a --rename_map that exchanges cameras the tokens would "
                "be of another camera than the policy's: train without one.",
                OBS_LAM_CAMERAS,
            )
        self.token_store = settle_first_batch(self.config, self.token_store, meta, names, self._given_sources)
        if exchanged and self.config.lam_live_cache and not self.config.use_precomputed_lam_tokens:
            self.live_tokens.keep(meta, names)
        self._dataset_meta = None

    def _with_window_tokens(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its conditioning tokens `(B, lam_conditioning_steps, n·a)` under a fixed key."""
        if not self.config.use_lam_conditioning:
            return batch
        self._settle_first_batch(batch)
        tokens = self._window_tokens(batch)
        if self.training and self.config.lam_token_dropout:
            tokens = drop_tokens(tokens, self.config.lam_token_dropout)
        return {**self._last_observations(batch), OBS_LAM_TOKENS: tokens}

    def _window_tokens(self, batch: dict[str, Any]) -> Tensor:
        key, deltas = self.config.lam_tokens_key, self.config.lam_token_deltas
        if key in batch:
            tokens = batch[key]
        elif not self.config.use_precomputed_lam_tokens:
            tokens = self._computed_window(batch)
        elif "index" in batch:
            store = self._opened_store()
            check_batch(store, batch)
            tokens = store.window(batch["index"], deltas, ahead=max(deltas) > 0)
        else:
            raise TrainingError(
                f"the batch has neither LAM tokens under {key!r} nor frame indices under 'index' to find "
                f"them by (it has {sorted(batch)})"
            )
        if tokens.ndim == 2:  # one observation step without a time axis
            tokens = tokens.unsqueeze(1)
        steps = len(deltas)
        if deltas != list(range(1 - steps, 1)) and tokens.ndim == 3 and tokens.shape[1] != steps:
            raise TrainingError(
                f"LAM tokens {key!r} are of {tokens.shape[1]} frames, expected those of the {steps} "
                f"lam_token_offsets={deltas}: LamTokenDataset(dataset, store, config.lam_token_deltas) joins "
                "them"
            )
        if tokens.ndim != 3 or tokens.shape[1] < steps or tokens.shape[2] != self.config.lam_token_dim:
            raise TrainingError(
                f"LAM tokens {key!r} have shape {tuple(tokens.shape)}, expected (B, at least {steps}, "
                f"{self.config.lam_token_dim}) = (batch, lam_conditioning_steps, lam_num_learned_tokens * "
                "lam_action_latent_dim)"
            )
        return tokens[:, -steps:]

    def _opened_store(self) -> TokenStore | JoinedStores:
        if self.token_store is None:
            raise TrainingError(
                f"the batch has no LAM tokens under {self.config.lam_tokens_key!r} and this policy has no "
                "token store open: wrap the dataset in LamTokenDataset, or build the policy with LeRobot's "
                "make_policy and --policy.lam_tokens_path"
            )
        return self.token_store

    def _computed_window(self, batch: dict[str, Any]) -> Tensor:
        """Tokens of a dataset batch on the fly."""
        deltas = self.config.observation_delta_indices
        frames = self._raw_frames(batch)
        for camera, seen in frames.items():
            if seen.ndim != 5 or seen.shape[1] != len(deltas):
                raise TrainingError(
                    f"frames of {camera!r} have shape {tuple(seen.shape)}, expected (B, {len(deltas)}, 3, H, "
                    f"W): one frame for each of the policy's observation_delta_indices {deltas}"
                )
        is_pad = _padding(batch, next(iter(frames.values())))
        return self.live_tokens.window(frames, deltas, is_pad, batch.get("index"))

    def _with_current_tokens(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch of one tick, with tokens if a chunk of actions is about to be predicted."""
        given = self._given_tokens(batch)
        if given is not None:
            self._history = None  # frames of this tick are not kept: a later pair must not bridge the gap
            return self._queued(batch, given) if given.ndim == 3 else {**batch, OBS_LAM_TOKENS: given}
        self._clock.tick()
        if self.config.past_token_deltas and (self.config.lam_missing == "error" or self._computable()):
            self._remember_frames(batch)
        if self._queues[ACTION]:
            return batch
        self._clock.predict()
        return self._queued(batch, self._window_at_tick(batch))

    def _queued(self, batch: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        """The batch with a whole window of tokens `(B, lam_conditioning_steps, n·a)`, by way of the queue."""
        queue = self._queues[OBS_LAM_TOKENS]
        queue.clear()
        queue.extend(tokens[:, :-1].unbind(1))
        return {**batch, OBS_LAM_TOKENS: tokens[:, -1]}

    def _remember_frames(self, batch: dict[str, Any]) -> None:
        """Keep this tick's frames for the tokens of what has happened."""
        if self._history is None:
            from lerobot_lam_diffusion.live_tokens import FrameHistory

            self.diffusion.lam_model = self.live_tokens.models  # before the first action, or a clear error
            self._history = {live.camera_key: FrameHistory(self.config) for live in self.live_tokens.lams}
        frames = self._raw_frames(batch, is_deployed=True)
        self._compare_sizes(frames)
        for camera, seen in frames.items():
            self._history[camera].append(seen)

    def _window_at_tick(self, batch: dict[str, Any]) -> Tensor:
        """Conditioning tokens `(B, lam_conditioning_steps, n·a)` of this tick of a rollout.

        Those of offsets up to 0 are the LAM's, of the frames seen so far; those above 0 the guide's.
        """
        past, future = self.config.past_token_deltas, self.config.future_token_deltas
        state = batch[OBS_STATE]
        parts = []
        if past and self._history is not None:
            parts.append(self.live_tokens.newest(self._history))
        elif past and self.config.lam_missing == "zero":
            parts.append(torch.zeros(len(state), len(past), self.config.lam_token_dim, device=state.device))
        elif past:
            raise TrainingError(
                "a chunk of actions was asked for outside of select_action, which keeps the frames that "
                f"tokens of lam_token_offsets={past} are made of: call select_action each tick, or pass "
                f"tokens (B, {len(past) + len(future)}, {self.config.lam_token_dim}) under "
                f"{self.config.lam_tokens_key!r}"
            )
        if future and self.guide is not None:
            parts.append(self.guide.window(self._tick, future, len(state)).to(state.device))
            self.guide.compare(batch)
        elif future and self.config.lam_missing == "zero":
            parts.append(torch.zeros(len(state), len(future), self.config.lam_token_dim, device=state.device))
        elif future:
            raise TrainingError(
                f"this policy acts on tokens of what comes next (lam_token_offsets={future}), which no "
                "camera sees: pass --policy.lam_guidance=<video, or STORE#episode>, or "
                "--policy.lam_missing=zero to act without (trained with --policy.lam_token_dropout)"
            )
        return torch.cat(parts, dim=1)

    def _compare_sizes(self, frames: dict[str, Tensor]) -> None:
        """Warn, once, of a camera whose frames have another size than those of the training dataset."""
        if self._frame_sizes_seen:
            return
        self._frame_sizes_seen = True
        for source in self.config.token_sources:
            height, width = frames[str(source.camera_key)].shape[-2:]
            if source.frame_size not in (None, f"{height}x{width}"):
                logger.warning(
                    "The frames of the LAM's camera %r are %dx%d (height x width), those of the training "
                    "dataset were %s: the LAM gives other tokens for them. Set the camera, or the "
                    "environment, to the size of the dataset.",
                    source.camera_key, height, width, source.frame_size,
                )  # fmt: skip

    def _given_tokens(self, batch: dict[str, Any]) -> Tensor | None:
        """Tokens that need neither LAM nor guide: the batch's own, or zeros to act without.

        `(B, n·a)` of this tick, or with `lam_token_offsets` `(B, lam_conditioning_steps, n·a)`.
        """
        key, token_dim = self.config.lam_tokens_key, self.config.lam_token_dim
        if key in batch:
            tokens = batch[key]
            steps = len(self.config.lam_token_deltas)
            expected: tuple[int, ...]
            if self.config.lam_token_offsets is None or (steps == 1 and tokens.ndim == 2):
                expected, meaning = (token_dim,), "token of this tick"
            else:
                expected, meaning = (steps, token_dim), "tokens of all lam_token_offsets"
            if tuple(tokens.shape[1:]) != expected:
                raise TrainingError(
                    f"LAM tokens {key!r} have shape {tuple(tokens.shape)}, expected "
                    f"(B, {', '.join(map(str, expected))}): the {meaning} for each environment"
                )
            return tokens
        if self.config.future_token_deltas:
            return None
        if self.config.lam_missing == "zero" and not self._computable():
            state = batch[OBS_STATE]
            return torch.zeros(len(state), token_dim, device=state.device)
        return None

    def _computable(self) -> bool:
        """Whether there is a LAM at all; asked once between two resets. One that does not fit is an error."""
        if self._can_compute is None:
            try:
                self._can_compute = bool(self.live_tokens.lams)
            except LamNotFoundError as error:
                logger.warning("Acting without LAM tokens, as lam_missing=zero says: %s", error)
                self._can_compute = False
        return self._can_compute

    def _raw_frames(self, batch: dict[str, Any], is_deployed: bool = False) -> dict[str, Tensor]:
        """Camera → uint8 frames `(..., 3, H, W)` for the LAMs, as the pre-processor passed them on."""
        from lerobot_lam_diffusion.lam.preprocess import as_uint8

        cameras = list(dict.fromkeys(str(source.camera_key) for source in self.config.token_sources))
        frames = batch.get(OBS_LAM_IMAGES)
        if frames is None:
            raise TrainingError(
                f"the batch has no raw frames under {OBS_LAM_IMAGES!r} for the LAM, only {sorted(batch)}: "
                "use the pre-processor of this policy (make_pre_post_processors, or the one saved with its "
                "checkpoint)"
            )
        if isinstance(frames, Tensor):
            if len(cameras) > 1:
                raise TrainingError(
                    f"the raw frames under {OBS_LAM_IMAGES!r} are of one camera, the LAMs look at {cameras}: "
                    "pass a dict from camera to frames"
                )
            frames = {cameras[0]: frames}
        unknown = [camera for camera in cameras if camera not in frames]
        if unknown:
            named = ", ".join(map(repr, unknown))
            if is_deployed:
                raise DatasetError(
                    f"the LAM's camera {named} is not among the cameras {sorted(frames)} that the robot or "
                    "environment has: it needs the one that the policy was trained with, under that name "
                    "(--rename_map renames it; PushT gives pictures with --env.obs_type=pixels_agent_pos)"
                )
            raise DatasetError(
                f"the LAM's camera {named} is not among the cameras {sorted(frames)}; name one of them by "
                "--policy.lam_camera_key"
            )
        return {camera: as_uint8(frames[camera]) for camera in cameras}

    def _last_observations(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without the frames that only the LAM needs: `n_obs_steps` up to now of every observation."""
        delivered = self.config.observation_delta_indices
        window = len(delivered)
        if window == self.config.n_obs_steps:
            return batch
        first, stop = delivered.index(1 - self.config.n_obs_steps), delivered.index(0) + 1
        return {
            key: value[:, first:stop]
            if key.startswith(OBS_PREFIX)
            and isinstance(value, Tensor)
            and value.ndim > 1
            and value.shape[1] == window
            else value
            for key, value in batch.items()
        }

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
        """LeRobot's, and for deployment the LAMs are opened, so that what is wrong with them is told early.

        That is where LeRobot's commands give a config without a dataset: before they connect a robot.
        """
        policy = super().from_pretrained(pretrained_name_or_path, config=config, **kwargs)
        if config is not None and config.pretrained_path and kwargs.get("dataset_meta") is None:
            policy._open_lams_for_deployment()
        return policy

    def _open_lams_for_deployment(self) -> None:
        if not self.config.use_lam_conditioning:
            return
        if self.config.lam_missing == "zero":
            self._computable()
            return
        try:
            self.diffusion.lam_model = self.live_tokens.models
        except LamNotFoundError as error:
            if drives_a_robot():
                raise
            logger.warning("%s. The first action needs it, unless the batch brings tokens.", error)

    @classmethod
    def _load_as_safetensor(
        cls, model: "DiffusionLamPolicy", model_file: str, map_location: str, strict: bool
    ) -> "DiffusionLamPolicy":
        weights = load_file(model_file)
        if not model.config.use_lam_conditioning and any("cond_encoder.lam." in name for name in weights):
            raise TrainingError(
                f"{model_file} was trained with LAM conditioning, which --policy.use_lam_conditioning=false "
                "leaves no place for; leave that flag out"
            )
        load_weights(model, weights, model_file)  # always strict, whatever `strict` says
        return model


class DiffusionLamModel(DiffusionModel):
    """`DiffusionModel` whose conditioning takes LAM tokens, or exactly that model without them.

    Attributes:
        lam_model: The LAM, where tokens are computed live (a tuple, where the policy has several sources of
            tokens); None otherwise. Not an `nn.Module`.
        lam_projection: Linear `n·a -> n·a` without bias, the identity at the start: a missing token, zero,
            stays zero and adds nothing.
    """

    config: DiffusionLamConfig

    def __init__(self, config: DiffusionLamConfig) -> None:
        super().__init__(config)
        self.lam_model: Any = None
        if config.use_lam_conditioning:
            self.lam_projection = _linear_without_drawing(config.lam_token_dim, config.lam_token_dim)
            nn.init.eye_(self.lam_projection.weight)
            for block in list(self.unet.modules()):  # a list: the blocks change while we walk them
                if isinstance(block, DiffusionConditionalResidualBlock1d):
                    block.cond_encoder = LamCondEncoder(block.cond_encoder, config.lam_conditioning_dim)

    def conditioning_layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """Stock and LAM linear of each residual block; none of a compiled U-Net, which has no hooks."""
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


def drop_tokens(tokens: Tensor, probability: float) -> Tensor:
    """Zero whole windows with `probability`, and in the others each token with the same `probability`.

    At 0.5 this is the masking with which villa-X trains its actor. Tokens are `(B, T, n·a)`.
    """
    whole = torch.rand(len(tokens), 1, 1, device=tokens.device) < probability
    each = torch.rand(*tokens.shape[:2], 1, device=tokens.device) < probability
    return tokens.masked_fill(whole | each, 0.0)


def _padding(batch: dict[str, Any], frames: Tensor) -> Tensor:
    """Which frames `(B, T)` are LeRobot's copies: those of which all its flags say so.

    They are alike for all observations, but that its streaming flags a few frames of a video by a rounding
    error, and delivers them all the same.
    """
    flags = [
        value.to(frames.device)
        for key, value in batch.items()
        if key.startswith(OBS_PREFIX) and key.endswith("_is_pad") and value.shape == frames.shape[:2]
    ]
    if flags:
        return torch.stack(flags).all(0)
    raise TrainingError(
        "the batch does not tell which frames are padding (no 'observation.*_is_pad'), so that tokens at "
        "episode starts cannot be told from motion: build the dataset with delta_timestamps"
    )


def _linear_without_drawing(in_features: int, out_features: int) -> nn.Linear:
    """A bias-free linear whose construction leaves the random number stream as it is."""
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False)
