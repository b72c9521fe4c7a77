"""Is the LAM any good? Figures on episodes that the fit never saw, and the README.md that tells them."""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..base import LatentActionModel
from ..loading import WEIGHTS_FILE
from .data import FitData, moving_axes, moving_pixels
from .flow import mean_flow

_PROBE_PAIRS = 8000
"""Pairs that the probe is fitted to, at most."""

OF_STATE, OF_FLOW = "the state's change", "the optical flow"

_CARD = """\
# A compact latent action model

villa-X architecture, fitted with `lerobot-lam-fit`. Open it with `--lam.path` or `load_lam(path)`.

| about | |
| --- | --- |
{facts}

## Held-out figures ({episodes} episodes, {pairs} frame pairs)

{figures}

Moving pixels: a colour changes by more than 20 of 255. Errors on the 0..1 scale. The probe is a ridge
regression from a pair's VQ token, fitted on the other episodes. Shuffled: tokens of other pairs.
"""


@dataclass(frozen=True)
class Probe:
    """R² of what changed over a pair, held out, averaged over its axes.

    Attributes:
        token: from the pair's VQ token, by ridge regression.
        shuffled: the same from the token of another pair.
        target: what changed: the state, or the optical flow where the data have no state that changes.
    """

    token: float
    shuffled: float
    target: str = OF_STATE


@dataclass(frozen=True)
class FitReport:
    """Held-out figures.

    Attributes:
        episodes, pairs: how many were held out.
        error, copy_error: mean square error of the predicted next frame and of the last frame, 0..1 scale.
        moving_error, moving_copy_error: the same where pixels move.
        deviation, copy_deviation, moving_deviation, moving_copy_deviation: the same as mean absolute errors.
        perplexity: perplexity of the codes, per slot; the number of codes if all are used equally often.
        codes_used: number of codes used, per slot.
        probe: None if nothing changes.
    """

    episodes: int
    pairs: int
    error: float
    copy_error: float
    moving_error: float
    moving_copy_error: float
    deviation: float
    copy_deviation: float
    moving_deviation: float
    moving_copy_deviation: float
    perplexity: list[float]
    codes_used: list[int]
    probe: Probe | None

    def lines(self) -> list[str]:
        """Rows of a Markdown table."""
        errors = [
            ("next frame, mean absolute error", ".2%", self.deviation, self.copy_deviation),
            ("moving pixels, mean absolute error", ".1%", self.moving_deviation, self.moving_copy_deviation),
            ("next frame, mean square error", ".5f", self.error, self.copy_error),
            ("moving pixels, mean square error", ".5f", self.moving_error, self.moving_copy_error),
        ]
        rows = [
            ("figure", "LAM", "against"),
            ("---", "---", "---"),
            *(
                (name, format(ours, digits), f"copy of the last frame {format(copied, digits)}")
                for name, digits, ours, copied in errors
            ),
            ("codebook perplexity per slot", ", ".join(f"{p:.1f}" for p in self.perplexity), ""),
            ("codes used per slot", ", ".join(str(c) for c in self.codes_used), ""),
        ]
        if self.probe is not None:
            against = f"shuffled tokens {self.probe.shuffled:.3f}"
            rows.append((f"probe: R² of {self.probe.target}", f"{self.probe.token:.3f}", against))
        return [f"| {' | '.join(row)} |" for row in rows]


def evaluate(lam: LatentActionModel, data: FitData, batch_size: int = 128) -> FitReport:
    """Measure a fitted LAM (opened with its FDM) on the held-out pairs of `data`."""
    heldout = data.holdout_pairs()
    sums: defaultdict[str, float] = defaultdict(float)
    moving_count, indices, tokens = 0, [], []
    for later in tqdm(heldout.split(batch_size), desc="evaluate", unit="batch"):
        prev, cur = (frames.to(lam.device) for frames in data.pair_frames(later))
        encoded = lam.encode_pairs(prev, cur)
        predicted = lam.predict_next(prev, encoded.of_kind(True))
        moving = moving_pixels(prev, cur)
        for copied, frames in (("", predicted), ("copy_", prev)):
            difference = (frames.float() - cur.float()) / 255  # (B, 3, R, R)
            for name, each in (("error", difference.square()), ("deviation", difference.abs())):
                each = each.mean(1)
                sums[f"{copied}{name}"] += each.mean((1, 2)).sum().item() / len(heldout)
                sums[f"moving_{copied}{name}"] += each[moving].sum().item()
        moving_count += int(moving.sum())
        indices.append(encoded.stored(True).cpu())
        tokens.append(encoded.of_kind(True).cpu())
    codes = torch.cat(indices)  # (pairs, n)
    return FitReport(
        episodes=len(data.episodes[heldout].unique()),
        pairs=len(heldout),
        **{
            name: value / max(moving_count, 1) if name.startswith("moving") else value
            for name, value in sums.items()
        },
        perplexity=[perplexity(codes[:, slot], lam.num_codes) for slot in range(codes.shape[1])],
        codes_used=[len(codes[:, slot].unique()) for slot in range(codes.shape[1])],
        probe=_probe_data(lam, data, torch.cat(tokens), batch_size),
    )


def _probe_data(
    lam: LatentActionModel, data: FitData, heldout_tokens: Tensor, batch_size: int
) -> Probe | None:
    """None if neither an axis of the state nor the picture changes."""
    pairs, heldout, target = evenly(data.fit_pairs(), _PROBE_PAIRS), data.holdout_pairs(), OF_STATE
    changes = None
    if data.states is not None:
        changes = data.state_changes(pairs), data.state_changes(heldout)
    if changes is None or not moving_axes(*changes).any():
        target = OF_FLOW
        changes = _flows(lam, data, pairs, batch_size), _flows(lam, data, heldout, batch_size)
    if not moving_axes(*changes).any():
        return None
    chunks = [
        lam.encode_pairs(*data.pair_frames(later)).of_kind(True).cpu()
        for later in tqdm(pairs.split(batch_size), desc="probe", unit="batch")
    ]
    return replace(probe(torch.cat(chunks), changes[0], heldout_tokens, changes[1]), target=target)


def _flows(lam: LatentActionModel, data: FitData, later: Tensor, batch_size: int) -> Tensor:
    pairs = (data.pair_frames(part) for part in tqdm(later.split(batch_size), desc="flow", unit="batch"))
    return torch.cat([mean_flow(prev.to(lam.device), cur.to(lam.device)).cpu() for prev, cur in pairs])


def probe(
    fit_tokens: Tensor, fit_changes: Tensor, tokens: Tensor, changes: Tensor, ridge: float = 1e-3
) -> Probe:
    """Ridge regression from tokens to changes of the state, measured on other pairs.

    Args:
        fit_tokens: (F, n·a); fit_changes: (F, S).
        tokens: (M, n·a); changes: (M, S).
        ridge: penalty per pair, on standardised tokens.

    Axes that do not change have no R², and are left out; if none changes, all figures are NaN.
    """
    moves = moving_axes(fit_changes, changes)
    fit_changes, changes = fit_changes[:, moves], changes[:, moves]
    order = torch.randperm(len(fit_tokens), generator=torch.Generator().manual_seed(0))
    other = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))
    predicted = ridge_predictions(fit_tokens, fit_changes, tokens, ridge)
    by_chance = ridge_predictions(fit_tokens[order], fit_changes, tokens[other], ridge)
    token, shuffled = (float(axis_r2(each, changes).mean()) for each in (predicted, by_chance))
    return Probe(token, shuffled)


def evenly(rows: Tensor, at_most: int) -> Tensor:
    """At most so many of `rows`, evenly spaced."""
    places = torch.linspace(0, len(rows) - 1, min(len(rows), at_most), dtype=torch.float64)
    return rows[places.long()]


def perplexity(indices: Tensor, num_codes: int) -> float:
    """exp of the entropy of the codes' frequencies: 1 (one code) to `num_codes` (all evenly)."""
    shares = torch.bincount(indices.flatten(), minlength=num_codes).double() / indices.numel()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def ridge_predictions(inputs: Tensor, targets: Tensor, queries: Tensor, ridge: float = 1e-3) -> Tensor:
    """Ridge regression from inputs (F, D) to targets (F, S), asked for queries (M, D): double (M, S)."""
    mean, spread = inputs.double().mean(0), inputs.double().std(0) + 1e-6
    x, q = (inputs - mean) / spread, (queries - mean) / spread
    y_mean = targets.double().mean(0)
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=torch.double)
    return q @ torch.linalg.solve(gram, x.T @ (targets - y_mean)) + y_mean


def axis_r2(predicted: Tensor, target: Tensor) -> Tensor:
    """R² of each axis, double (S,), of predictions and targets (M, S)."""
    residual = (target - predicted).double().square().sum(0)
    total = (target - target.mean(0)).double().square().sum(0)
    return 1 - residual / total.clamp(min=1e-12)


def write_card(folder: Path, lam: LatentActionModel, report: FitReport, facts: dict[str, str]) -> None:
    """Write `README.md` into a model folder.

    Args:
        facts: name → text, on data and recipe.
    """
    config = lam.config
    size = (folder / WEIGHTS_FILE).stat().st_size / 1e6
    parameters = sum(p.numel() for module in lam.modules.values() for p in module.parameters())
    model = {
        "model": f"{config.resolution} px, patches of {config.patch_size}, {parameters:,} parameters",
        "size": f"{size:.1f} MB",
        "tokens": f"{config.num_learned_tokens} × {config.action_latent_dim}, {config.n_codes} codes",
        "fingerprint": f"`{lam.fingerprint}`",
    }
    text = _CARD.format(
        facts="\n".join(f"| {name} | {value} |" for name, value in (facts | model).items()),
        episodes=report.episodes,
        pairs=report.pairs,
        figures="\n".join(report.lines()),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
