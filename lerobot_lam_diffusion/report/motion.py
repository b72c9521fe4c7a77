"""How the state changed over each token's frame pair, and how well the tokens predict it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lerobot_lam_diffusion.lam.fit.data import moving_axes
from lerobot_lam_diffusion.lam.fit.report import axis_r2, ridge_predictions
from lerobot_lam_diffusion.precompute.rows import rows_of, vectors_of
from lerobot_lam_diffusion.report.codes import Codes
from lerobot_lam_diffusion.tokens.store import TokenStore

STATE_KEY = "observation.state"
_FIT, _HELD_OUT = 8000, 4000
"""Pairs that the probe is fitted to, and measured on, at most."""


@dataclass(frozen=True)
class StateProbe:
    """R² of the state's change on held-out episodes, by ridge regression from the token.

    Attributes:
        names: of the S dimensions that change, in fitted and held-out pairs; `still` are the others.
        token, shuffled: R² of each dimension from its own token, and from the token of another pair.
        predicted, measured: double (M, S) on the held-out pairs, in the state's units.
        held_out: episodes.
    """

    names: list[str]
    still: list[str]
    token: list[float]
    shuffled: list[float]
    predicted: Tensor
    measured: Tensor
    held_out: list[int]

    @property
    def best(self) -> int:
        """The dimension that the token explains best."""
        return int(np.argmax(self.token))

    @property
    def mean(self) -> float:
        """Over dimensions; one that is predicted worse than by its mean counts as 0."""
        return sum(max(r2, 0.0) for r2 in self.token) / len(self.token)

    @property
    def mean_shuffled(self) -> float:
        return sum(max(r2, 0.0) for r2 in self.shuffled) / len(self.shuffled)


def dimension_names(feature: dict[str, Any], path: str) -> list[str]:
    """Names of a vector's dimensions, as the dataset has them, else numbers."""
    names: Any = feature.get("names")
    while isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    size = int(np.prod(feature["shape"]))
    if isinstance(names, list | tuple | dict) and len(names) == size:
        return [str(name) for name in names]
    return [f"{path}[{axis}]" for axis in range(size)]


def read_states(dataset: Any) -> Tensor | None:
    """The state of all frames, double (N, S) by absolute index, NaN where not opened; None: no state."""
    if STATE_KEY not in rows_of(dataset).column_names:
        return None
    values = vectors_of(dataset, STATE_KEY)
    states = np.full((dataset.meta.total_frames, values.shape[1]), np.nan)
    states[vectors_of(dataset, "index")[:, 0].astype(int)] = values
    return torch.from_numpy(states)


def probe_state(
    store: TokenStore, codes: Codes, changes: Tensor, names: list[str], seed: int
) -> StateProbe | None:
    """Fit and measure the probe; None if fewer than two episodes have tokens or the state never changes.

    Args:
        changes: double (M, S), of the state over each pair of `codes`.
    """
    generator = torch.Generator().manual_seed(seed)
    episodes = codes.episodes.unique()
    if len(episodes) < 2:
        return None
    episodes = episodes[torch.randperm(len(episodes), generator=generator)]
    held_out = episodes[: max(1, len(episodes) // 5)]
    is_held = torch.isin(codes.episodes, held_out)
    fit = _some((~is_held).nonzero().flatten(), _FIT, generator)
    ask = _some(is_held.nonzero().flatten(), _HELD_OUT, generator)
    if min(len(fit), len(ask)) < 2:
        return None
    moves = moving_axes(changes[fit], changes[ask])
    if not moves.any():
        return None
    tokens, asked = (store.window(codes.frames[rows], [0])[:, 0].double() for rows in (fit, ask))
    target, measured = changes[fit][:, moves], changes[ask][:, moves]
    predicted = ridge_predictions(tokens, target, asked)
    mixed = torch.randperm(len(fit), generator=generator), torch.randperm(len(ask), generator=generator)
    chance = ridge_predictions(tokens[mixed[0]], target, asked[mixed[1]])
    return StateProbe(
        names=[name for name, moving in zip(names, moves.tolist(), strict=True) if moving],
        still=[name for name, moving in zip(names, moves.tolist(), strict=True) if not moving],
        token=axis_r2(predicted, measured).tolist(),
        shuffled=axis_r2(chance, measured).tolist(),
        predicted=predicted,
        measured=measured,
        held_out=sorted(held_out.tolist()),
    )


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count]].sort().values
