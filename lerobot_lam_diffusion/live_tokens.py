"""Tokens from raw frames, in training and on the robot: the same numbers that a store holds.

Training gets a window of frames from the dataset, a robot one frame a tick; both end in `LiveLam.encode`. A
frame before the episode's first one does not exist (LeRobot pads with copies), so a pair that needs it has no
token: zeros, as in a store. Where the policy has several sources (cameras, LAMs), `LiveTokens` puts their
tokens side by side.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.lam import (
    LamError,
    LamTokens,
    LatentActionModel,
    TokenShape,
    load_lam,
    resolve_lam,
)
from lerobot_lam_diffusion.problems import LamNotFoundError, raise_unfit
from lerobot_lam_diffusion.sources import LamSource, twins

if TYPE_CHECKING:
    from lerobot_lam_diffusion.live_cache import LiveCache

logger = logging.getLogger(__name__)


def open_lams(config: DiffusionLamConfig) -> list[LatentActionModel]:
    """Load the LAM of each source and check that it is the one that the policy is for.

    Returns:
        As many as there are sources; a LAM of several sources is loaded once.

    Raises:
        LamNotFoundError: a LAM or camera is not named, or no LAM is there.
        UserError: a damaged LAM, another token shape, or another LAM than trained with.
    """
    loaded: dict[Path, LatentActionModel] = {}
    lams = []
    for source, folder in zip(config.token_sources, find_lams(config), strict=True):
        if folder not in loaded:
            loaded[folder] = load_lam(str(source.model_path), dtype=getattr(torch, config.lam_dtype))
        lams.append(loaded[folder])
    check_lams(config, [lam.fingerprint for lam in lams], lams)
    return lams


def find_lams(config: DiffusionLamConfig) -> list[Path]:
    """The folder of each source's LAM, without symbolic links.

    Raises:
        LamNotFoundError: a LAM or camera is not named, or no LAM is there; all problems at once.
    """
    sources = config.token_sources
    if any(source.model_path is None or source.camera_key is None for source in sources):
        raise LamNotFoundError(
            "this diffusion_lam policy needs LAM tokens, and there are none in the batch "
            f"({config.lam_tokens_key!r}) and no LAM to compute them: pass --policy.lam_model_path=<LAM "
            "folder or Hub id> and --policy.lam_camera_key=<camera that it looks at>"
            + (f", for each of the policy's {len(sources)} sources of tokens" if len(sources) > 1 else "")
        )
    folders: list[Path] = []
    errors: dict[str, None] = {}  # each once
    for source in sources:
        try:
            folders.append(resolve_lam(str(source.model_path)).resolve())
        except LamError as error:
            errors[str(error)] = None
    if errors:
        raise LamNotFoundError(
            "the policy's LAM is not where --policy.lam_model_path says; name another place by that flag. "
            + " ".join(errors)
        )
    return folders


def check_lams(
    config: DiffusionLamConfig,
    fingerprints: Sequence[str],
    shapes: Sequence[TokenShape],
) -> None:
    """Check that each source's LAM, of that fingerprint and token shape, is the one that the policy is for.

    Raises:
        UserError: another token shape, another LAM than trained with, or two sources that are the same; all
            problems at once.
    """
    sources = config.token_sources
    problems, others = [], []
    for source, fingerprint, shape in zip(sources, fingerprints, shapes, strict=True):
        told = {
            "lam_num_learned_tokens": (source.num_learned_tokens, shape.num_learned_tokens),
            "lam_action_latent_dim": (source.action_latent_dim, shape.action_latent_dim),
        }
        own = [
            f"--policy.{k} is {want}, the LAM has {have}"
            for k, (want, have) in told.items()
            if want not in (None, have)
        ]
        if config.lam_use_vq_tokens and not shape.num_codes:
            own.append(
                "it has no codebook, so its tokens are continuous: pass --policy.lam_use_vq_tokens=false"
            )
        if source.fingerprint not in (None, fingerprint):
            other = (
                f"its fingerprint is {fingerprint[:16]}…, the policy was trained with the tokens of "
                f"{str(source.fingerprint)[:16]}…"
            )
            if own:
                own.append(f"{other}; pass that LAM by its path")
            elif config.lam_allow_mismatch:
                others.append(other)
            else:
                own.append(
                    f"{other}; pass that LAM, or --policy.lam_allow_mismatch=true to use this one anyway"
                )
        name = str(source.model_path)
        problems.append((name if len(sources) == 1 else f"{name} for {source.camera_key}", own))
    views = [(source.camera_key, print_) for source, print_ in zip(sources, fingerprints, strict=True)]
    same = [
        f"sources {one} and {other} are the same: --policy.lam_camera_key={views[one - 1][0]}, and "
        f"--policy.lam_model_path names the same LAM (fingerprint {views[one - 1][1][:16]}…) for both; leave "
        "one of them out"
        for one, other in twins(views)
    ]
    raise_unfit("LAM", problems, common=same)
    for other in others:
        logger.warning("ANOTHER LAM THAN TRAINED WITH: %s. Its tokens mean other things.", other)


class LiveTokens:
    """A policy's tokens from frames, of all its sources side by side.

    The LAMs are loaded when they are first needed. Not an `nn.Module`, so they are in no optimizer,
    checkpoint, DDP bucket or parameter count.
    """

    def __init__(self, config: DiffusionLamConfig) -> None:
        self._config = config
        self._lams: list[LiveLam] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the LAMs have been loaded."""
        return self._lams is not None

    @property
    def lams(self) -> "list[LiveLam]":
        """One for each source."""
        if self._lams is None:
            models = open_lams(self._config)
            self._lams = [
                LiveLam(self._config, source, model)
                for source, model in zip(self._config.token_sources, models, strict=True)
            ]
            for source in self._config.token_sources:
                logger.info("LAM tokens: on the fly, by %s from %s.", source.model_path, source.camera_key)
        return self._lams

    def keep(self, dataset_meta: Any, names: Mapping[str, str] | None = None) -> None:
        """Keep the tokens of this dataset's frames where `lam_live_cache` says, and take kept ones there.

        Args:
            names: The policy's names of cameras → the dataset's, as far as they are known.

        Raises:
            UserError: the cache is damaged, or a camera is not one of the dataset's.
            OSError: the cache cannot be made.
        """
        from lerobot_lam_diffusion.live_cache import open_live_caches  # nothing else here needs datasets

        models = [live.lam for live in self.lams]
        caches = open_live_caches(self._config, dataset_meta, models, names)
        for live, cache in zip(self.lams, caches, strict=True):
            live.cache = cache

    @property
    def models(self) -> LatentActionModel | tuple[LatentActionModel, ...]:
        """The LAM, or those of several sources."""
        models = tuple(live.lam for live in self.lams)
        return models[0] if len(models) == 1 else models

    def window(
        self, frames: dict[str, Tensor], deltas: list[int], is_pad: Tensor, index: Tensor | None
    ) -> Tensor:
        """Conditioning tokens `(B, lam_conditioning_steps, lam_token_dim)` of a training batch.

        Args:
            frames: Camera → frames; these and the rest as in `LiveLam.window`.
        """
        return self._joined(lambda live: live.window(frames[live.camera_key], deltas, is_pad, index))

    def newest(self, history: "dict[str, FrameHistory]") -> Tensor:
        """Tokens of offsets up to 0, `(B, steps, lam_token_dim)`, at this tick.

        Args:
            history: Camera → its frames.
        """
        return self._joined(lambda live: history[live.camera_key].tokens(live))

    def _joined(self, tokens: "Callable[[LiveLam], Tensor]") -> Tensor:
        return torch.cat([tokens(live) for live in self.lams], dim=-1)


class LiveLam:
    """One source: a LAM that looks at one camera, following its frames to their device.

    Attributes:
        camera_key: The camera, as the policy names it.
        lam: The LAM; other sources may share it.
        cache: Keeps the tokens of a training dataset's frames, if asked for.
    """

    def __init__(self, config: DiffusionLamConfig, source: LamSource, lam: LatentActionModel) -> None:
        self.camera_key = str(source.camera_key)
        self.lam = lam
        self.cache: LiveCache | None = None
        self._config = config

    @property
    def token_dim(self) -> int:
        """Numbers in one frame's token of this source, n * a."""
        return self.lam.num_learned_tokens * self.lam.action_latent_dim

    def encode(self, prev: Tensor, cur: Tensor) -> Tensor:
        """Tokens float32 `(P, n·a)` of uint8 frame pairs `(P, 3, H, W)`, without gradients."""
        tokens = self._ask(prev, cur)
        return tokens.of_kind(self._config.lam_use_vq_tokens)

    def _ask(self, prev: Tensor, cur: Tensor) -> LamTokens:
        if self.lam.device != prev.device:
            self.lam.to(prev.device)
        return self.lam.encode_pairs(prev, cur)

    def window(self, frames: Tensor, deltas: list[int], is_pad: Tensor, index: Tensor | None) -> Tensor:
        """Conditioning tokens of a training batch.

        Args:
            frames: uint8 `(B, T, 3, H, W)`, one for each of `deltas`.
            deltas: Frame offsets of the window, ascending.
            is_pad: bool `(B, T)`: the frame is a copy that LeRobot put where the episode has none.
            index: int64 `(B,)` absolute frame indices, to encode a pair that occurs twice only once.

        Returns:
            float32 `(B, lam_conditioning_steps, n·a)`.
        """
        at = {delta: position for position, delta in enumerate(deltas)}
        stride = self._config.lam_frame_stride or 1
        steps = self._config.lam_token_deltas
        cur = frames[:, [at[delta] for delta in steps]].flatten(0, 1)  # (B * steps, 3, H, W)
        prev = frames[:, [at[delta - stride] for delta in steps]].flatten(0, 1)
        padded = (
            is_pad[:, [at[delta - stride] for delta in steps]] | is_pad[:, [at[delta] for delta in steps]]
        )
        exists = ~padded.flatten()
        tokens = torch.zeros(len(cur), self.token_dim, device=frames.device)
        if exists.any():
            pair_index = None
            if index is not None:
                pair_index = (index.unsqueeze(1) + torch.tensor(steps, device=index.device)).flatten()[exists]
            tokens[exists] = self._encode_distinct(prev[exists], cur[exists], pair_index)
        return tokens.unflatten(0, (len(frames), len(steps)))

    def _encode_distinct(self, prev: Tensor, cur: Tensor, pair_index: Tensor | None) -> Tensor:
        """Encode each pair once. Pairs of one index may still differ: augmentation changes pixels."""
        if pair_index is None:
            if self.cache is not None:
                self.cache.miss("the batch has no 'index', which tells the frames")
            return self.encode(prev, cur)
        order = torch.arange(len(pair_index), device=pair_index.device)
        _, group = torch.unique(pair_index, return_inverse=True)
        first = torch.full_like(order, len(order)).scatter_reduce(0, group, order, "amin")[group]
        repeats = (
            (first != order) & (prev == prev[first]).flatten(1).all(1) & (cur == cur[first]).flatten(1).all(1)
        )
        source = torch.where(repeats, first, order)
        distinct = (~repeats).nonzero().flatten()
        position = torch.empty_like(order).index_copy_(
            0, distinct, torch.arange(len(distinct), device=order.device)
        )
        return self._kept_or_encoded(prev[distinct], cur[distinct], pair_index[distinct])[position[source]]

    def _kept_or_encoded(self, prev: Tensor, cur: Tensor, pair_index: Tensor) -> Tensor:
        if self.cache is None:
            return self.encode(prev, cur)
        return self.cache.tokens(prev, cur, pair_index, self._ask)


class FrameHistory:
    """A camera's real frames since the last reset, just long enough for the tokens of one window.

    Those of offsets up to 0, that is: what comes next no camera has seen.
    """

    def __init__(self, config: DiffusionLamConfig) -> None:
        self._stride = config.lam_frame_stride or 1
        self._deltas = [delta for delta in config.lam_token_deltas if delta <= 0]
        self._frames: deque[Tensor] = deque(maxlen=1 - self._deltas[0] + self._stride)

    def append(self, frames: Tensor) -> None:
        """Add this tick's frames, uint8 `(B, 3, H, W)`."""
        self._frames.append(frames)

    def tokens(self, live: LiveLam) -> Tensor:
        """Tokens `(B, number of offsets up to 0, n·a)` at this tick; zero before the first pair."""
        frames = list(self._frames)
        newest = frames[-1]
        tokens = torch.zeros(len(newest), len(self._deltas), live.token_dim, device=newest.device)
        known = [delta for delta in self._deltas if len(frames) > self._stride - delta]
        if known:
            cur = torch.cat([frames[delta - 1] for delta in known])
            prev = torch.cat([frames[delta - 1 - self._stride] for delta in known])
            encoded = live.encode(prev, cur).unflatten(0, (len(known), -1))  # (known, B, n·a)
            tokens[:, -len(known) :] = encoded.transpose(0, 1)
        return tokens
