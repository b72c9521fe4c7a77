"""Tokens from raw frames, in training and on the robot: the same numbers that a store holds.

Training gets a window of frames from the dataset, a robot one frame a tick; both end in `LiveLam.encode`. A
frame before the episode's first one does not exist (LeRobot pads with copies), so a pair that needs it has no
token: zeros, as in a store.
"""

import logging
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig, single
from lerobot_lam_diffusion.lam import LamConfig, LamError, LatentActionModel, load_lam, resolve_lam
from lerobot_lam_diffusion.problems import LamNotFoundError, raise_problems

logger = logging.getLogger(__name__)


def open_lam(config: DiffusionLamConfig) -> LatentActionModel:
    """Load the LAM that `config` names and check that it is the one that the policy is for.

    Raises:
        LamNotFoundError: no LAM or camera named, or no LAM there.
        UserError: a damaged LAM, another token shape, or another LAM than trained with.
    """
    find_lam(config)
    path = single(config.lam_model_path)
    assert path is not None
    lam = load_lam(path, dtype=getattr(torch, config.lam_dtype))
    check_lam(config, lam.fingerprint, lam)
    return lam


def find_lam(config: DiffusionLamConfig) -> Path:
    """The folder of the LAM that `config` names.

    Raises:
        LamNotFoundError: no LAM or camera named, or no LAM there.
    """
    path = single(config.lam_model_path)
    if path is None or single(config.lam_camera_key) is None:
        raise LamNotFoundError(
            "this diffusion_lam policy needs LAM tokens, and there are none in the batch "
            f"({config.lam_tokens_key!r}) and no LAM to compute them: pass --policy.lam_model_path=<LAM "
            "folder or Hub id> and --policy.lam_camera_key=<camera that it looks at>"
        )
    try:
        return resolve_lam(path)
    except LamError as error:
        raise LamNotFoundError(
            "the policy's LAM is not where --policy.lam_model_path says; name another place by that flag. "
            f"{error}"
        ) from error


def check_lam(config: DiffusionLamConfig, fingerprint: str, shape: LatentActionModel | LamConfig) -> None:
    """Check that this LAM, of that fingerprint and token shape, is the one that the policy is for.

    Raises:
        UserError: another token shape, or another LAM than trained with; all problems at once.
    """
    told = {
        "lam_num_learned_tokens": (config.lam_num_learned_tokens, shape.num_learned_tokens),
        "lam_action_latent_dim": (config.lam_action_latent_dim, shape.action_latent_dim),
    }
    problems = [
        f"--policy.{k} is {want}, the LAM has {have}"
        for k, (want, have) in told.items()
        if want not in (None, have)
    ]
    trained_with = single(config.lam_fingerprint)
    if trained_with not in (None, fingerprint):
        other = (
            f"its fingerprint is {fingerprint[:16]}…, the policy was trained with the tokens of "
            f"{trained_with[:16]}…"  # type: ignore[index]
        )
        if config.lam_allow_mismatch:
            logger.warning("ANOTHER LAM THAN TRAINED WITH: %s. Its tokens mean other things.", other)
        else:
            problems.append(
                f"{other}; pass that LAM, or --policy.lam_allow_mismatch=true to use this one anyway"
            )
    raise_problems(f"LAM {single(config.lam_model_path)} does not fit the policy", problems)


class LiveLam:
    """The policy's LAM: loaded when first needed, following its frames to their device.

    Not an `nn.Module`, so it is in no optimizer, checkpoint, DDP bucket or parameter count.
    """

    def __init__(self, config: DiffusionLamConfig) -> None:
        self._config = config
        self._lam: LatentActionModel | None = None

    @property
    def is_open(self) -> bool:
        """Whether the LAM has been loaded."""
        return self._lam is not None

    @property
    def lam(self) -> LatentActionModel:
        if self._lam is None:
            self._lam = open_lam(self._config)
        return self._lam

    def encode(self, prev: Tensor, cur: Tensor) -> Tensor:
        """Tokens float32 `(P, n·a)` of uint8 frame pairs `(P, 3, H, W)`, without gradients."""
        lam = self.lam
        if lam.device != prev.device:
            lam.to(prev.device)
        tokens = lam.encode_pairs(prev, cur)
        return tokens.quantized if self._config.lam_use_vq_tokens else tokens.continuous

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
        exists = ~is_pad[:, [at[delta - stride] for delta in steps]].flatten()
        tokens = torch.zeros(len(cur), self._config.lam_token_dim, device=frames.device)
        if exists.any():
            pair_index = None
            if index is not None:
                pair_index = (index.unsqueeze(1) + torch.tensor(steps, device=index.device)).flatten()[exists]
            tokens[exists] = self._encode_distinct(prev[exists], cur[exists], pair_index)
        return tokens.unflatten(0, (len(frames), len(steps)))

    def _encode_distinct(self, prev: Tensor, cur: Tensor, pair_index: Tensor | None) -> Tensor:
        """Encode each pair once. Pairs of one index may still differ: augmentation changes pixels."""
        if pair_index is None:
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
        return self.encode(prev[distinct], cur[distinct])[position[source]]


class FrameHistory:
    """Real frames since the last reset, just long enough for the tokens of one conditioning window."""

    def __init__(self, config: DiffusionLamConfig) -> None:
        self._stride = config.lam_frame_stride or 1
        self._steps = len(config.lam_token_deltas)
        self._token_dim = config.lam_token_dim
        self._frames: deque[Tensor] = deque(maxlen=self._steps + self._stride)

    def append(self, frames: Tensor) -> None:
        """Add this tick's frames, uint8 `(B, 3, H, W)`."""
        self._frames.append(frames)

    def tokens(self, live: LiveLam) -> Tensor:
        """Conditioning tokens `(B, lam_conditioning_steps, n·a)` at this tick; zero before the first pair."""
        newest = self._frames[-1]
        tokens = torch.zeros(len(newest), self._steps, self._token_dim, device=newest.device)
        known = min(self._steps, len(self._frames) - self._stride)
        if known > 0:
            frames = list(self._frames)
            cur = torch.cat(frames[-known:])
            prev = torch.cat(frames[-known - self._stride : len(frames) - self._stride])
            encoded = live.encode(prev, cur).unflatten(0, (known, -1))  # (known, B, n·a)
            tokens[:, -known:] = encoded.transpose(0, 1)
        return tokens
