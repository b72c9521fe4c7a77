"""Held-out error of the next actions on PushT: the diffusion policy with and without LAM tokens.

    python -m tests.benchmarks.study.offline --dataset.root=DIR --work_dir=WORK [--study=5] [--until=TIER]
        [--conditions "1 obs: stock" "1 obs: latest"] [--seeds 0 1]

The conditions stand in the order in which they are run; each is finished for all training seeds before the
next one begins, except in study 9, which takes long: there a seed is finished for all conditions.
"""

import argparse
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from lerobot_lam_diffusion.lam.fit.recipe import FLOW_TERM, STATE_TERM

from . import lams
from .data import Recorded, pusht
from .lams import LamChoice, Tokens
from .policies import Budget, SmallPictures, Windows, run
from .results import Results

HELD_OUT = 40  # the last episodes; of 206, 166 are left for training
SEEDS = (0, 1, 2)
FULL = 600  # steps of a LAM's fit
LAM_BATCH, PRESET = 32, "compact"
PIXELS, WITH_STATE = LamChoice(FULL), LamChoice(FULL, STATE_TERM)
RANDOM = LamChoice(0, is_random=True)
INFORMATIVE, OF_FLOW = LamChoice(1200, STATE_TERM), LamChoice(1200, FLOW_TERM)
BUDGET = Budget()
LONG = 3000  # steps, to see whether what is found hangs on the short training


@dataclass(frozen=True)
class Condition:
    """What one arm sees beside the agent's state and keypoints or pictures.

    Attributes:
        against: The condition that its error is divided by.
        sees: `stock` nothing; `lam` its tokens; `shuffled` those of other episodes; `zero` tokens of zeros;
            `change` the state's true change instead; `both` change and token; `flow` the optical flow itself.
        kind: Of a LAM's tokens: `vq`, `continuous`, `standardized`.
        demonstrations: None: all training episodes.
        steps: Of the policy's training.
        batch_size: Likewise.
    """

    tier: int
    name: str
    against: str
    n_obs_steps: int = 2
    sees: str = "lam"
    lam: LamChoice = PIXELS
    kind: str = "vq"
    offsets: tuple[int, ...] = (0,)
    demonstrations: int | None = None
    steps: int = BUDGET.steps
    batch_size: int = BUDGET.batch_size
    seeds: tuple[int, ...] = SEEDS
    windows: type[Windows] = Windows

    def tokens(self, data: Recorded, work_dir: Path) -> Tokens | None:
        if self.sees == "stock":
            return None
        if self.sees == "change":
            return lams.state_changes(data)
        if self.sees == "flow":
            return lams.flows(data)
        how = {"folder": work_dir / "lams", "batch_size": LAM_BATCH, "preset": PRESET}
        tokens = lams.of_lam(self.lam, self.kind, data, **how)
        if self.sees == "shuffled":
            return lams.of_other_episodes(tokens, data)
        if self.sees == "zero":
            values = torch.zeros_like(tokens.store.values)
            return replace(tokens, store=lams.store_of(values, data, self.lam.stride))
        return lams.beside(tokens, lams.state_changes(data), data) if self.sees == "both" else tokens


def study_1() -> list[Condition]:
    """What was registered first; where nothing else is said, the LAM is fitted to pixels alone."""
    found = []
    for n in (1, 2):
        stock = f"{n} obs: stock"
        found += [
            Condition(1, stock, stock, n, "stock"),
            Condition(1, f"{n} obs: latest", stock, n),
            Condition(1, f"{n} obs: shuffled", stock, n, "shuffled"),
            Condition(1, f"{n} obs: true state change", stock, n, "change"),
            Condition(3, f"{n} obs: random LAM", stock, n, lam=RANDOM),
            Condition(3, f"{n} obs: LAM with the state's term", stock, n, lam=WITH_STATE),
        ]
    stock = "2 obs: stock"
    found += [
        Condition(1, "2 obs: concat", stock, offsets=(-1, 0)),
        Condition(1, "3 obs: stock", stock, 3, "stock"),
        Condition(1, "4 obs: stock", stock, 4, "stock"),
        Condition(3, "2 obs: continuous", stock, kind="continuous"),
        Condition(3, "2 obs: random LAM, standardized", stock, lam=RANDOM, kind="standardized"),
        Condition(3, "2 obs: next 8 (intent)", stock, offsets=tuple(range(1, 9))),
        Condition(3, "2 obs: zero", stock, sees="zero", seeds=SEEDS[:1]),  # one shows that it is stock
    ]
    for n in (1, 2):  # is it a matter of too little training?
        long = f"{n} obs, {LONG} steps: stock"
        found += [
            Condition(2, long, long, n, "stock", steps=LONG, seeds=SEEDS[:1]),
            Condition(2, f"{n} obs, {LONG} steps: latest", long, n, steps=LONG, seeds=SEEDS[:1]),
        ]
    for tier, demonstrations in ((4, 25), (4, 100), (7, 50)):
        few, stock = f"{demonstrations} demos, 2 obs", f"{demonstrations} demos, 2 obs: stock"
        found += [
            Condition(tier, stock, stock, sees="stock", demonstrations=demonstrations),
            Condition(tier, f"{few}: latest", stock, demonstrations=demonstrations),
            Condition(7, f"{few}: true state change", stock, sees="change", demonstrations=demonstrations),
        ]
    for steps in (0, 50, 300):
        lam = LamChoice(steps)
        found.append(Condition(5, f"1 obs: LAM of {steps} steps", "1 obs: stock", 1, lam=lam))
    for stride in (2, 4):
        lam = LamChoice(FULL, stride=stride)
        found.append(Condition(6, f"2 obs: latest, stride {stride}", "2 obs: stock", lam=lam))
    change = "2 obs: true state change"
    found.append(Condition(7, "2 obs: change and token", change, sees="both"))
    for demonstrations in (25, 100, 50):
        few, stock = f"{demonstrations} demos, 1 obs", f"{demonstrations} demos, 1 obs: stock"
        found += [
            Condition(7, stock, stock, 1, "stock", demonstrations=demonstrations),
            Condition(7, f"{few}: latest", stock, 1, demonstrations=demonstrations),
        ]
    return sorted(found, key=lambda condition: condition.tier)


def study_5() -> list[Condition]:
    """Registered after the results of study 1: the same with a LAM whose tokens say what moved."""
    token = partial(Condition, lam=INFORMATIVE)
    one, stock, long = "1 obs: stock", "2 obs: stock", f"2 obs, {LONG} steps: stock"
    found = [
        Condition(1, stock, stock, sees="stock"),
        token(1, "2 obs: latest", stock),
        token(1, "2 obs: shuffled", stock, sees="shuffled"),
        token(1, "2 obs: concat", stock, offsets=(-1, 0)),
        Condition(1, "2 obs: true state change", stock, sees="change"),
        Condition(1, one, one, 1, "stock"),
        token(1, "1 obs: latest", one, 1),
        token(1, "1 obs: shuffled", one, 1, sees="shuffled"),
        token(3, "2 obs: next 4 (intent)", stock, offsets=tuple(range(1, 5))),
        token(3, "2 obs: next 8 (intent)", stock, offsets=tuple(range(1, 9))),
        token(3, "2 obs: continuous", stock, kind="continuous"),
        token(3, "2 obs: change and token", "2 obs: true state change", sees="both"),
        Condition(4, long, long, sees="stock", steps=LONG),
        token(4, f"2 obs, {LONG} steps: latest", long, steps=LONG),
    ]
    for steps in (25, 75, 200):
        lam = LamChoice(steps, STATE_TERM)
        found.append(Condition(2, f"1 obs: LAM of {steps} steps", one, 1, lam=lam))
    for demonstrations in (25, 100):
        few = f"{demonstrations} demos, 2 obs: stock"
        found += [
            Condition(5, few, few, sees="stock", demonstrations=demonstrations),
            token(5, f"{demonstrations} demos, 2 obs: latest", few, demonstrations=demonstrations),
        ]
    for stride in (2, 4):
        lam = replace(INFORMATIVE, stride=stride)
        found.append(Condition(6, f"2 obs: latest, stride {stride}", stock, lam=lam))
    found.append(Condition(7, "1 obs: LAM of pixels alone, 3000 steps", one, 1, lam=LamChoice(3000)))
    return sorted(found, key=lambda condition: condition.tier)


def study_9() -> list[Condition]:
    """Pictures as input instead of keypoints, with the LAM of study 5."""
    arm = partial(Condition, lam=INFORMATIVE, windows=SmallPictures, batch_size=32)
    one, two = "pictures, 1 obs: stock", "pictures, 2 obs: stock"
    return [
        arm(1, one, one, 1, "stock"),
        arm(1, "pictures, 1 obs: latest", one, 1),
        arm(1, two, two, 2, "stock"),
        arm(1, "pictures, 2 obs: latest", two, 2),
        arm(1, "pictures, 1 obs: shuffled", one, 1, "shuffled"),
    ]


def study_12() -> list[Condition]:
    """A LAM of pixels alone whose tokens are tied to the optical flow, beside that of study 5."""
    found = []
    for n in (1, 2):
        stock = f"{n} obs: stock"
        found += [
            Condition(1, stock, stock, n, "stock"),
            Condition(1, f"{n} obs: latest, flow", stock, n, lam=OF_FLOW),
            Condition(1, f"{n} obs: shuffled, flow", stock, n, "shuffled", lam=OF_FLOW),
            Condition(2, f"{n} obs: latest, state", stock, n, lam=INFORMATIVE),
            Condition(3, f"{n} obs: the flow itself", stock, n, "flow"),
        ]
    return sorted(found, key=lambda condition: condition.tier)


STUDIES = {1: study_1, 5: study_5, 9: study_9, 12: study_12}


def results_of(study: int, work_dir: Path) -> Results:
    return Results(work_dir / ("offline.jsonl" if study == 1 else f"study_{study}.jsonl"))


def runs(conditions: list[Condition], study: int, seeds: list[int]) -> list[tuple[Condition, int]]:
    """Conditions and training seeds in the order in which they are run."""
    found = [(condition, seed) for condition in conditions for seed in condition.seeds if seed in seeds]
    return sorted(found, key=lambda run: run[1]) if study == 9 else found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset.root", dest="root", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--first_seed", type=int, default=100, help="of the recording, to recover keypoints")
    parser.add_argument("--study", type=int, choices=STUDIES, default=1)
    parser.add_argument("--until", type=int, default=7, help="last tier of conditions to run")
    parser.add_argument("--conditions", nargs="+", help="of the study; all if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args(argv)
    conditions = [condition for condition in STUDIES[args.study]() if condition.tier <= args.until]
    if unknown := set(args.conditions or ()) - {condition.name for condition in conditions}:
        parser.error(f"--conditions: {sorted(unknown)} are not conditions of study {args.study}")
    conditions = [c for c in conditions if not args.conditions or c.name in args.conditions]
    args.work_dir.mkdir(parents=True, exist_ok=True)
    data = pusht(args.root, args.work_dir, HELD_OUT, args.first_seed)
    results = results_of(args.study, args.work_dir)
    for condition, seed in runs(conditions, args.study, args.seeds):
        if results.has(condition.name, seed):
            continue
        frames = data.frames_of(0, condition.demonstrations or data.train_episodes)
        tokens = condition.tokens(data, args.work_dir)
        r2 = lams.probe_r2(tokens, data) if condition.sees in ("lam", "flow") else None
        found = run(
            data, tokens, condition.offsets, condition.n_obs_steps, frames,
            replace(BUDGET, steps=condition.steps, batch_size=condition.batch_size), seed, condition.windows,
        )  # fmt: skip
        results.add(condition=condition.name, seed=seed, probe_r2=r2, **found)
        print(
            f"{condition.name:<40} seed {seed}  error {found['mean']:.5f}  {found['cpu_seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
