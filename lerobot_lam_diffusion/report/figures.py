"""The report's pictures, as bytes of a PNG or JPEG for the page. Only this module imports matplotlib."""

import io
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lerobot_lam_diffusion.report.codes import Codes
from lerobot_lam_diffusion.report.motion import StateProbe

_INK, _BAR, _CHANCE = "#222222", "#2563a8", "#c2410c"
_WIDTH = 6.4  # inches at 110 dpi: legible on a phone
_MOST_CODES = 64
_MOST_SLOTS = 4


def jpeg(picture: Tensor) -> bytes:
    """uint8 (3, H, W) → JPEG."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=82)
    return file.getvalue()


def probe_bars(probe: StateProbe) -> bytes:
    """R² of each dimension, from its token and by chance; the best and the worst come first in long lists."""
    order = sorted(range(len(probe.names)), key=lambda axis: -probe.token[axis])
    order = order if len(order) <= 40 else [*order[:20], *order[-20:]]
    figure = _figure(0.9 + 0.32 * len(order))
    axes = figure.subplots()
    at = np.arange(len(order))
    axes.barh(at - 0.18, [max(probe.token[axis], -0.2) for axis in order], 0.36, color=_BAR, label="token")
    shuffled = [max(probe.shuffled[axis], -0.2) for axis in order]
    axes.barh(at + 0.18, shuffled, 0.36, color=_CHANCE, label="shuffled tokens")
    axes.set_yticks(at, [_short(probe.names[axis]) for axis in order])
    axes.invert_yaxis()
    axes.set_xlim(min(-0.05, *(max(value, -0.2) for value in probe.token + probe.shuffled)), 1)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_xlabel("R² of the state's change, held-out episodes")
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return _png(figure)


def probe_scatter(probe: StateProbe, axis: int) -> bytes:
    """Measured change against the one predicted from the token."""
    figure = _figure(4.2, width=4.6)
    axes = figure.subplots()
    measured, predicted = probe.measured[:, axis].numpy(), probe.predicted[:, axis].numpy()
    axes.plot(measured, predicted, ".", markersize=3, alpha=0.45, color=_BAR)
    ends = [float(measured.min()), float(measured.max())]
    axes.plot(ends, ends, color=_CHANCE, linewidth=1)
    axes.set_xlabel("measured change")
    axes.set_ylabel("predicted from the token")
    axes.set_title(f"{_short(probe.names[axis], 30)}: R² {probe.token[axis]:.2f}", fontsize=10)
    return _png(figure)


def usage_bars(codes: Codes) -> bytes:
    slots = min(len(codes.slots), _MOST_SLOTS)
    figure = _figure(0.5 + 1.5 * slots)
    for slot, axes in enumerate(figure.subplots(slots, 1, sharey=True, squeeze=False)[:, 0]):
        shares = codes.shares(slot)
        if len(shares) > 256:
            shares = shares.sort(descending=True).values[:256]
        axes.bar(range(len(shares)), 100 * shares.numpy(), color=_BAR)
        axes.axhline(100 / codes.num_codes, color=_CHANCE, linewidth=1, linestyle="--")
        axes.set_ylabel(f"{codes.slots[slot]}, %")
    axes.set_xlabel("code" if codes.num_codes <= 256 else "the 256 most frequent codes, in order")
    return _png(figure)


def transition_maps(codes: Codes) -> bytes:
    slots = min(len(codes.slots), _MOST_SLOTS)
    columns = min(slots, 2)
    rows = -(-slots // columns)
    figure = _figure(3.3 * rows)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells[slots:]:
        axes.set_axis_off()
    for slot, axes in enumerate(cells[:slots]):
        some = codes.shares(slot).topk(min(codes.num_codes, _MOST_CODES)).indices.sort().values
        share = codes.transitions(slot)[some][:, some]
        image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=max(float(share.max()), 1e-9))
        axes.set_title(codes.slots[slot].split(" (")[0], fontsize=10)
        axes.set_xlabel("next code")
        axes.set_ylabel("code")
        figure.colorbar(image, ax=axes, shrink=0.75)
    return _png(figure)


def strip_chart(
    labels: Tensor, slots: list[str], num_codes: int, speed: Tensor | None, seconds: np.ndarray
) -> bytes:
    """Codes (T, n; -1: none) and the state's speed (T,) of one episode over time."""
    shown = labels[:, :8].T.float().masked_fill(labels[:, :8].T < 0, float("nan"))
    rows = 1 if speed is None else 2
    figure = _figure(1.0 + 0.22 * len(shown) + (1.1 if rows == 2 else 0))
    heights = [0.5 + 0.22 * len(shown), 1.1][:rows]
    cells = figure.subplots(rows, 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    end = float(seconds[-1]) if len(seconds) > 1 else 1.0
    cells[0].imshow(
        shown.numpy(), aspect="auto", cmap="turbo", vmin=0, vmax=num_codes - 1, interpolation="nearest",
        extent=(0, end, len(shown) - 0.5, -0.5),
    )  # fmt: skip
    cells[0].set_yticks(range(len(shown)), [name.split(" (")[0] for name in slots[: len(shown)]])
    if speed is not None:
        cells[1].plot(seconds, speed.numpy(), color=_BAR, linewidth=1)
        cells[1].set_ylabel("state speed", fontsize=8)
        cells[1].set_ylim(bottom=0)
    cells[-1].set_xlabel("seconds")
    return _png(figure)


def pair_tiles(pairs: list[tuple[Tensor, Tensor]]) -> bytes:
    """One column per pair of uint8 (3, H, W): frame, next frame and their difference, stacked."""
    columns = []
    for prev, cur in pairs:
        brighter_or_darker = (cur.int() - prev.int() + 128).clamp(0, 255).to(torch.uint8)
        columns.append(torch.cat([prev, cur, brighter_or_darker], dim=1))
    return jpeg(torch.cat(columns, dim=2))


def _figure(height: float, width: float = _WIDTH) -> Any:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _short(name: str, length: int = 22) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
