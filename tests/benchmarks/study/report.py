"""The study's tables, and its picture.

python -m tests.benchmarks.study.report --work_dir=WORK --study=5 [--picture=docs/images/evidence.png]
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from . import closed_loop, conveyor, offline
from .offline import Condition
from .results import Results
from .statistics import Interval, difference, ratio, wilson

SHOWN = {
    1: {
        "true state change": "the state's true change instead of a token",
        "LAM with the state's term": "token of a LAM fitted with the state",
        "latest": "token of a LAM fitted to pixels alone",
        "random LAM": "token of a LAM of random weights",
        "shuffled": "tokens of other episodes",
    },
    5: {
        "next 8 (intent)": "the next eight tokens (an oracle)",
        "true state change": "the state's true change instead of a token",
        "concat": "the last two tokens",
        "latest": "the last token",
        "shuffled": "tokens of other episodes",
    },
}
"""Conditions of each study's picture, with their labels."""


def relative(results: Results, condition: Condition, field: str) -> Interval:
    """Error of a condition as a share of the one that it is compared with, of the seeds that both have."""
    seeds = [seed for seed in results.seeds(condition.name) if seed in results.seeds(condition.against)]
    ours, theirs = (results.values(name, field, seeds) for name in (condition.name, condition.against))
    return ratio(ours, theirs)


def probe_of(rows: list[dict]) -> str:
    """Of a condition's finished runs; empty where it has no LAM."""
    probe = rows[0].get("probe_r2")
    return "" if probe is None else f"{probe:.2f}"


def grips(rows: list[dict]) -> Interval:
    """Share of grips, training seeds pooled."""
    return wilson(sum(row["grips"] for row in rows), sum(row["n"] for row in rows))


def spread(interval: Interval) -> list[list[float]]:
    """As matplotlib's `xerr`."""
    return [[interval.value - interval.low], [interval.high - interval.value]]


def offline_table(results: Results, conditions: list[Condition]) -> str:
    lines = [
        "| condition | against | seeds | error | relative error | of the mean of 4 samples | probe R² |",
        "|---|---|---|---|---|---|---|",
    ]
    for condition in conditions:
        seeds = results.seeds(condition.name)
        if not seeds:
            lines.append(f"| {condition.name} | {condition.against} | not run | | | | |")
            continue
        error = results.values(condition.name, "error", seeds).mean()
        rows = [row for row in results.rows if row["condition"] == condition.name]
        shares = [str(relative(results, condition, field)) for field in ("error", "error_of_mean")]
        if condition.name == condition.against:
            shares = ["1", "1"]
        cells = [condition.name, condition.against, str(len(seeds)), f"{error:.4f}", *shares, probe_of(rows)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def conveyor_table(results: Results, study: int) -> str:
    lines = ["| condition | seeds | misses by (px) | grips within 5 px | probe R² |", "|---|---|---|---|---|"]
    for name in conveyor.STUDIES[study].conditions:
        rows = [row for row in results.rows if row["condition"] == name]
        if not rows:
            lines.append(f"| {name} | not run | | | |")
            continue
        misses = [row["px"] * np.mean(row["error"]) ** 0.5 for row in rows]
        cells = [name, str(len(rows)), f"{np.mean(misses):.1f}", str(grips(rows)), probe_of(rows)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def closed_loop_table(results: Results, study: int) -> str:
    """Success of all seeds pooled; coverage and held-out error beside the study's first condition."""
    first = next(iter(closed_loop.STUDIES[study].conditions))
    second = closed_loop.STUDIES[study].task.coverage
    lines = [
        f"| condition | seeds | success | mean {second} | against {first} | held-out error | probe R² |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["condition"] for row in results.rows):
        condition, steps = name.split(", ")
        rows = [row for row in results.rows if row["condition"] == name]
        seeds, against = results.seeds(name), f"{first}, {steps}"
        success = results.values(name, "success", seeds)
        coverage = results.values(name, "coverage", seeds)
        both = [seed for seed in seeds if seed in results.seeds(against)]
        more = ""
        if condition != first and both:
            ours, theirs = (results.values(arm, "coverage", both) for arm in (name, against))
            more = str(difference(ours, theirs))
        errors = [np.mean(row["error"]) for row in rows if "error" in row]
        error = f"{np.mean(errors):.4f}" if errors else ""
        share = str(wilson(int(success.sum()), success.size))
        cells = [name, str(len(seeds)), share, f"{coverage.mean():.3f}", more, error, probe_of(rows)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: Results, study: int, path: Path) -> None:
    """Relative errors of a study with their intervals, one and two observations side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
    known, shown = {condition.name: condition for condition in offline.STUDIES[study]()}, SHOWN[study]
    for n, axis in zip((1, 2), axes, strict=True):
        for place, suffix in enumerate(reversed(shown)):
            if f"{n} obs: {suffix}" not in known:
                continue
            interval = relative(results, known[f"{n} obs: {suffix}"], "error")
            axis.errorbar(interval.value, place, xerr=spread(interval), fmt="o", color="tab:blue", capsize=3)
        axis.axvline(1, color="grey", linewidth=1)
        axis.set_xlim(0, 1.2)
        axis.set_title(f"{n} observation{'s' if n > 1 else ''}", fontsize=10)
        axis.set_xlabel("error of the next actions, stock policy = 1", fontsize=9)
    axes[0].set_yticks(range(len(shown)), list(reversed(shown.values())), fontsize=9)
    figure.savefig(path, dpi=130)


def draw_conveyor(results: Results, study: int, path: Path) -> None:
    """What the task is, and the share of grips of each condition with Wilson's interval."""
    figure, (scene, axis) = plt.subplots(1, 2, figsize=(9, 2.6), width_ratios=(1, 2.2), layout="constrained")
    ride = conveyor.Ride(middle=48, speed=0, rest=0)
    scene.imshow(ride.picture(0)[36:84], extent=(0, 96, 84, 36))
    for speed in (-conveyor.FASTEST, conveyor.FASTEST):
        arrow = {"arrowstyle": "->", "linewidth": 2, "color": "black"}
        scene.annotate("", (48 + conveyor.LEAD * speed, 50), (48 + 7 * np.sign(speed), 50), arrowprops=arrow)
        scene.text(48 + conveyor.LEAD * speed, 44, "here?", ha="center", fontsize=9)
    scene.set_title("where will the block\nbe in 0.8 s?", fontsize=10)
    scene.set_axis_off()
    names = [name for name in reversed(conveyor.STUDIES[study].conditions) if results.seeds(name)]
    for place, name in enumerate(names):
        rows = [row for row in results.rows if row["condition"] == name]
        share = grips(rows)
        _, tokens, _ = conveyor.STUDIES[study].conditions[name]
        color = "tab:blue" if tokens == "latest" else "tab:grey"
        axis.barh(place, share.value, color=color, height=0.6)
        axis.errorbar(share.value, place, xerr=spread(share), color="black", capsize=3)
        axis.text(share.high + 0.02, place, f"{share.value:.0%}", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), [textwrap.fill(name, 34) for name in names], fontsize=9)
    axis.set_xlim(0, 1.12)
    axis.set_xlabel(f"grips within {conveyor.GRIP:.0f} px of the block", fontsize=9)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="of studies 1, 2, 5 and 7")
    studies = [*offline.STUDIES, *conveyor.STUDIES, *closed_loop.STUDIES]
    parser.add_argument("--study", type=int, choices=sorted(studies), default=1)
    args = parser.parse_args(argv)
    if args.study in closed_loop.STUDIES:
        print(closed_loop_table(closed_loop.results_of(args.study, args.work_dir), args.study))
        return
    if args.study in conveyor.STUDIES:
        results = conveyor.results_of(args.study, args.work_dir)
        print(conveyor_table(results, args.study))
        if args.picture is not None:
            draw_conveyor(results, args.study, args.picture)
        return
    results = offline.results_of(args.study, args.work_dir)
    print(offline_table(results, offline.STUDIES[args.study]()))
    hours = sum(row["cpu_seconds"] for row in results.rows) / 3600
    print(f"\n{len(results.rows)} policies: {hours:.1f} hours of one CPU core")
    if args.picture is not None:
        draw(results, args.study, args.picture)


if __name__ == "__main__":
    main()
