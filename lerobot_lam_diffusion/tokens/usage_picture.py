"""How often a store's tokens use each code of the codebook, as bars: a slot of the token above the other.

Needs matplotlib, which training does not: `pip install matplotlib`.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from lerobot_lam_diffusion.tokens.store import TokenStore

_INK, _FAINT, _BAR, _EVEN = "#222222", "#8a8a8a", "#2563a8", "#c2410c"
_MAX_SLOTS = 8
_MAX_BARS = 256


def draw_usage(store: TokenStore, title: str, path: Path) -> Path:
    """Write the picture as a PNG.

    Args:
        store: Of VQ tokens.
        title: Name of the store.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = store.code_counts()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    perplexity = store.code_perplexity()
    slots = min(len(shares), _MAX_SLOTS)
    head, foot, row = 0.95, 0.7, 1.55  # inches
    height = head + foot + row * slots
    figure = Figure(figsize=(9, height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.16 / height, title, fontsize=14, weight="bold", color=_INK, va="top")
    total = f"{int(counts[0].sum()):,}"
    summary = f"Codebook use: share of the {total} tokens that has each code. Dashed: all codes used alike."
    figure.text(0.02, 1 - 0.48 / height, summary, fontsize=10, color="#555555", va="top")
    grid = figure.add_gridspec(
        slots, 1, left=0.085, right=0.98, top=1 - head / height, bottom=foot / height, hspace=0.42
    )
    top = 115 * float(shares[:slots].max())
    for slot in range(slots):
        axes = figure.add_subplot(grid[slot])
        _draw_slot(axes, shares[slot], top)
        used = int((counts[slot] > 0).sum())
        told = f"slot {slot}: {used} of {len(shares[slot])} codes, perplexity {perplexity[slot]:.1f}"
        axes.set_title(told, fontsize=10, loc="left", color=_INK, pad=4)
        axes.tick_params(labelbottom=slot == slots - 1)
    more = f" (slots {slots} to {len(shares) - 1} are not shown)" if len(shares) > slots else ""
    codes = "code" if shares.shape[1] <= _MAX_BARS else f"the {_MAX_BARS} most frequent codes, in order"
    axes.set_xlabel(f"{codes}{more}", fontsize=10, color=_INK)
    figure.savefig(path, dpi=110)
    return path


def _draw_slot(axes: Any, shares: Tensor, top: float) -> None:
    """Bars of one slot; of a large codebook the most frequent codes, since bars need room."""
    from matplotlib.ticker import MaxNLocator

    even = 100 / len(shares)
    if len(shares) > _MAX_BARS:
        shares = shares.sort(descending=True).values[:_MAX_BARS]
    axes.bar(range(len(shares)), (100 * shares).tolist(), width=0.82, color=_BAR, zorder=2)
    axes.axhline(even, color=_EVEN, linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
    axes.set_xlim(-0.7, len(shares) - 0.3)
    axes.set_ylim(0, max(top, 1e-9))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8, zorder=0)
    axes.tick_params(colors=_INK, labelsize=9, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
