"""The demo's picture: what the LAM sees in an episode that nobody trained on, and how training went."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Rectangle

from lerobot_lam_diffusion.demo.episode_look import EpisodeLook

_INK, _FAINT, _ACCENT = "#222222", "#8a8a8a", "#c2410c"
_MISSING = "#d4d4d4"
_NUM_MOMENTS = 6
_ROWS = (
    "frame now\n(box: shown\nenlarged below)",
    "next frame,\ntrue",
    "next frame,\npredicted\n(now + token)",
    "error of\n“nothing moves”",
    "error of the\nprediction",
)
_AVERAGED_STEPS = 10  # of the loss


def draw_picture(look: EpisodeLook, losses: list[float], path: Path) -> Path:
    """Write the picture as a PNG.

    Args:
        losses: One per training step, from the first.
    """
    figure = Figure(figsize=(12, 14.3), facecolor="white")
    FigureCanvasAgg(figure)
    title = f"What a latent action model sees in PushT, episode {look.episode} (held out of training)"
    figure.text(0.025, 0.98, title, fontsize=17, weight="bold", color=_INK, va="top")
    figure.text(0.025, 0.953, _summary(look), fontsize=12, color="#555555", va="top", linespacing=1.4)
    moments = choose_moments(look)
    above = figure.add_gridspec(
        len(_ROWS), len(moments) + 1, left=0.135, right=0.94, top=0.866, bottom=0.328,
        hspace=0.05, wspace=0.05, width_ratios=[1] * len(moments) + [0.09],
    )  # fmt: skip
    below = figure.add_gridspec(
        2, 1, left=0.135, right=0.605, top=0.262, bottom=0.045, height_ratios=[1, 1.5], hspace=0.12
    )
    _draw_frames(figure, above, look, moments)
    strip = figure.add_subplot(below[0])
    _draw_codes(strip, look)
    _draw_speed(figure.add_subplot(below[1], sharex=strip), look, moments)
    _draw_wheel(figure.add_axes((0.622, 0.2, 0.075, 0.063)))
    _draw_losses(figure.add_axes((0.76, 0.045, 0.205, 0.217)), losses)
    figure.savefig(path, dpi=120)
    return path


def choose_moments(look: EpisodeLook) -> list[int]:
    """Frames to show, in order: the fastest ones that lie well apart. The frame before each exists."""
    speeds = np.linalg.norm(look.motion, axis=1)
    apart = len(speeds) // (_NUM_MOMENTS + 3)
    chosen: list[int] = []
    for i in 1 + np.argsort(-speeds[1:], kind="stable"):
        if len(chosen) < _NUM_MOMENTS and all(abs(i - other) > apart for other in chosen):
            chosen.append(int(i))
    return sorted(chosen)


def motion_colors(motion: np.ndarray, fast: float) -> np.ndarray:
    """RGB (..., 3) of motions (..., 2): hue is the direction; white is no motion, full colour is `fast`."""
    hue = (np.arctan2(motion[..., 1], motion[..., 0]) / (2 * np.pi)) % 1
    speed = np.clip(np.linalg.norm(motion, axis=-1) / max(fast, 1e-9), 0, 1)
    return hsv_to_rgb(np.stack([hue, 0.85 * speed, 1 - 0.12 * speed], axis=-1))


def _summary(look: EpisodeLook) -> str:
    slots, codes = look.code_motion.shape[:2]
    moving, moving_copy = look.moving_errors
    whole, whole_copy = 100 * look.fdm_error.mean(), 100 * look.copy_error.mean()
    text = (
        f"A pair of frames becomes a token: {slots} codes, each one of {codes}. From a frame and the token "
        "of the step that follows, the model's forward half (FDM) draws the next frame. Mean error: "
        f"{100 * moving:.1f} % of full brightness on the pixels that move, {whole:.1f} % on the whole frame; "
        f"if nothing moved, {100 * moving_copy:.1f} % and {whole_copy:.1f} %."
    )
    return textwrap.fill(text, 120)


def _draw_frames(figure: Figure, grid: GridSpec, look: EpisodeLook, moments: list[int]) -> None:
    copied, predicted = look.copy_error, look.fdm_error
    worst = max(0.05, float(np.quantile(copied[[i - 1 for i in moments]], 0.998)))
    scale = ScalarMappable(Normalize(0, worst), "gist_heat_r")
    for column, i in enumerate(moments):
        box = _box(copied[i - 1])
        details = look.frames[i], look.predicted[i - 1], copied[i - 1], predicted[i - 1]
        pictures = look.frames[i - 1], *(picture[box] for picture in details)
        for row, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[row, column])
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("#cccccc")
            axes.imshow(picture, cmap=scale.cmap, vmin=0, vmax=worst, interpolation="nearest")
            if row == 0:
                _outline(axes, box)
                codes = " ".join(map(str, look.codes[i]))
                axes.set_title(
                    f"{(i - 1) / look.fps:.1f} → {i / look.fps:.1f} s\ncodes {codes}", fontsize=11, color=_INK
                )
            if column == 0:
                axes.set_ylabel(
                    _ROWS[row], rotation=0, ha="right", va="center", fontsize=11, color=_INK, labelpad=8
                )
    bar = figure.colorbar(scale, cax=figure.add_subplot(grid[3:, -1]))
    bar.set_label("error (% of full brightness)", fontsize=10, color=_INK)
    bar.ax.spines[:].set_visible(False)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    bar.ax.tick_params(labelsize=9, length=2, colors=_INK)


def _box(change: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the part of the frame, half as wide, round which it changes most."""
    size = len(change)
    side = max(size // 2, 1)
    weight = change.astype(np.float64) ** 2 + 1e-12

    def part(axis: int) -> slice:
        middle = np.average(np.arange(size), weights=weight.sum(axis=axis))
        first = int(np.clip(round(middle) - side // 2, 0, size - side))
        return slice(first, first + side)

    return part(axis=1), part(axis=0)


def _outline(axes: Axes, box: tuple[slice, slice]) -> None:
    rows, columns = box
    corner = (columns.start - 0.5, rows.start - 0.5)
    width, height = columns.stop - columns.start, rows.stop - rows.start
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=_ACCENT, linewidth=1))


def _draw_codes(axes: Axes, look: EpisodeLook) -> None:
    """A row per slot; a code has the colour of the motion that it stands for in the other episodes."""
    frames, slots = look.codes.shape
    motion = np.stack([look.code_motion[slot][look.codes[:, slot]] for slot in range(slots)])
    image = motion_colors(motion, _fast(look))  # (n, T, 3)
    image[look.codes.T < 0] = to_rgb(_MISSING)
    axes.imshow(image, aspect="auto", extent=_extent(look, slots), interpolation="nearest")
    for slot in range(slots):
        axes.axhline(slot, color="white", linewidth=2)
    size = min(8.0, 400 / frames)
    if size >= 4:  # pt; smaller ones nobody reads
        for i, slot in np.argwhere(look.codes >= 0):
            code = str(look.codes[i, slot])
            where = (i / look.fps, slot + 0.5)
            axes.text(*where, code, fontsize=size, rotation=90, ha="center", va="center", color=_INK)
    axes.set_yticks(np.arange(slots) + 0.5, [f"slot {slot + 1}" for slot in range(slots)])
    axes.tick_params(labelbottom=False, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        "Tokens: codes over time, in the colour of their mean motion elsewhere",
        fontsize=12, loc="left", color=_INK,
    )  # fmt: skip


def _draw_speed(axes: Axes, look: EpisodeLook, moments: list[int]) -> None:
    speeds = np.linalg.norm(look.motion, axis=1) * look.fps
    seconds = np.arange(len(speeds)) / look.fps
    colors = motion_colors(look.motion, _fast(look))
    axes.bar(seconds, speeds, width=1 / look.fps, color=colors)
    axes.step(seconds, speeds, where="mid", color=_INK, linewidth=1)
    top = max(1.0, 1.15 * float(speeds.max()))
    axes.plot(
        [i / look.fps for i in moments], [speeds[i] + 0.06 * top for i in moments], "v", color=_INK, ms=5
    )
    axes.set(xlim=_extent(look, 1)[:2], ylim=(0, top), xlabel="time in the episode (s)")
    axes.set_ylabel("pusher's speed\n(arena px/s)", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.text(
        0.995, 0.97, "▼ shown above", transform=axes.transAxes, ha="right", va="top", fontsize=9, color=_FAINT
    )


def _draw_wheel(axes: Axes) -> None:
    """Legend of the colours: which way the pusher moves."""
    x, y = np.meshgrid(np.linspace(-1, 1, 121), np.linspace(-1, 1, 121))
    image = np.ones((121, 121, 4))
    image[..., :3] = motion_colors(np.stack([x, y], axis=-1), 1.0)
    image[..., 3] = np.hypot(x, y) <= 1
    axes.imshow(image)
    axes.text(60, 135, "colour: which way\nthe pusher goes", fontsize=9, color=_FAINT, ha="center", va="top")
    axes.axis("off")


def _draw_losses(axes: Axes, losses: list[float]) -> None:
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=_ACCENT, alpha=0.3, linewidth=1, label="each step")
    window = min(_AVERAGED_STEPS, max(1, len(losses) // 2))
    averaged = np.convolve(losses, np.ones(window) / window, mode="valid")
    middle = steps[: len(averaged)] + (window - 1) / 2
    axes.plot(middle, averaged, color=_ACCENT, linewidth=2.4, label=f"mean of {window} steps")
    axes.set(xlabel="training step", ylabel="loss (noise MSE)", xlim=(0, len(losses) + 1))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10)
    axes.set_title("lerobot-train on these tokens", fontsize=12, loc="left", color=_INK)


def _extent(look: EpisodeLook, rows: int) -> tuple[float, float, float, float]:
    """Frame i spans half a frame time on both sides of i / fps; rows go downwards."""
    half = 0.5 / look.fps
    return -half, (len(look.codes) - 1) / look.fps + half, rows, 0


def _fast(look: EpisodeLook) -> float:
    """px per frame: what the colours call fast."""
    return max(1.0, float(np.quantile(np.linalg.norm(look.motion, axis=1), 0.9)))
