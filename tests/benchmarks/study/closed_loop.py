"""Success in closed loop: the diffusion policy with and without the live token of the last pair.

    python -m tests.benchmarks.study.closed_loop --dataset.root=DIR --work_dir=WORK [--study=3]
    python -m tests.benchmarks.study.closed_loop --dataset.root=NEW --work_dir=WORK --study=11
    python -m tests.benchmarks.study.closed_loop … --study=8 --device=cuda --steps=N --seeds 0 1 2

Each finished training is a line; a command that is run again goes on where it stopped. `--steps` and
`--seeds` say how much to train. Commands for different conditions or seeds may run side by side. The task is
PushT, from study 11 on the pendulum, which is recorded first.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor

from lerobot_lam_diffusion import DiffusionLamPolicy
from lerobot_lam_diffusion.demo.pusht import PushTEnv, make_env
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.lam.fit.recipe import FLOW_TERM, STATE_TERM

from . import lams, pendulum
from .data import ACTION, ENV, STATE, Recorded, pusht, reset_to_start
from .lams import LamChoice, Tokens
from .policies import Budget, Pictures, Windows, errors, train
from .results import Results

LAM, LAM_BATCH, PRESET = LamChoice(1200, STATE_TERM), 32, "compact"
HELD_OUT = 40  # episodes that the LAM's probe is measured on; the policy's test are new starts
FIRST_START, STARTS = 50_000, 200  # seeds of the test's starts; no demonstration has one of them
BUDGET = Budget(steps=20_000, learning_rate=1e-3, down_dims=(64, 128), ema=0.999)

Condition = tuple[int, str]  # observations; which tokens


class Arena(Protocol):
    """Several environments that advance in step, each from its own start.

    Attributes:
        solved: Whether each has succeeded so far (B,).
        coverage: How well each has done so far, 0 to 1 (B,).
        is_over: Whether nothing can change any more.
    """

    @property
    def solved(self) -> np.ndarray: ...
    @property
    def coverage(self) -> np.ndarray: ...
    @property
    def is_over(self) -> bool: ...
    def observed(self) -> dict[str, Tensor]:
        """Columns (B, D) that the policy sees, as recorded."""
        ...

    def frames(self) -> Tensor:
        """uint8 (B, 3, 96, 96)."""
        ...

    def step(self, actions: Tensor) -> None:
        """Act (B, A), on the scale of the recording."""
        ...


@dataclass(frozen=True)
class PushT:
    """PushT, its keypoints recovered from the recording.

    Attributes:
        near_goal: Whether episodes start near the goal.
        longest: Steps of an episode.
        coverage: What the second measure is.
    """

    near_goal: bool
    longest: int
    coverage: ClassVar[str] = "largest coverage"

    def demonstrations(self, root: Path, folder: Path, first_seed: int) -> Recorded:
        return pusht(root, folder, HELD_OUT, first_seed, self.near_goal)

    def arena(self, starts: int) -> Arena:
        return PushTs(self.near_goal, starts)


@dataclass(frozen=True)
class Pendulum:
    """The pendulum whose velocity is hidden."""

    longest: int
    coverage: ClassVar[str] = "share of steps held"

    def demonstrations(self, root: Path, folder: Path, first_seed: int) -> Recorded:
        return pendulum.demonstrations(root, folder, HELD_OUT)

    def arena(self, starts: int) -> Arena:
        return pendulum.Pendulums(starts)


@dataclass(frozen=True)
class Study:
    """One registered run.

    Attributes:
        task: What is recorded and acted on.
        windows: What the policy sees: keypoints or pictures, and the state.
        conditions: By name; the first one is what the others are compared with.
        budget: Of each training; `--steps` replaces its steps.
        lam: Whose tokens they are.
    """

    task: PushT | Pendulum
    windows: type[Windows]
    conditions: dict[str, Condition]
    budget: Budget = BUDGET
    lam: LamChoice = LAM


NEAR = PushT(near_goal=True, longest=150)
WITH_KEYPOINTS = {name: (2, name) for name in ("stock", "latest", "true state change")}
ONE_AND_TWO = {"stock with 1 observation": (1, "stock"), "stock with 2 observations": (2, "stock")}
STUDIES = {
    3: Study(PushT(near_goal=False, longest=300), Windows, WITH_KEYPOINTS),
    6: Study(NEAR, Windows, WITH_KEYPOINTS),
    8: Study(
        NEAR,
        Pictures,
        {
            **ONE_AND_TWO,
            "latest with 1 observation": (1, "latest"),
            "latest with 2 observations": (2, "latest"),
        },
    ),
    10: Study(NEAR, Windows, {name: (1, which) for name, (_, which) in WITH_KEYPOINTS.items()}),
    11: Study(
        Pendulum(pendulum.LONGEST),
        Windows,
        {
            **ONE_AND_TWO,
            "latest with 1 observation": (1, "latest"),
            "tokens of other episodes with 1 observation": (1, "shuffled"),
            "true state change with 1 observation": (1, "true state change"),
        },
        Budget(steps=4_000, n_action_steps=2),
    ),
}
STUDIES[14] = replace(
    STUDIES[11],
    conditions={
        name: (n, which)
        for name, (n, which) in STUDIES[11].conditions.items()
        if n == 1 and which != "true state change"
    },
    lam=replace(LAM, tied_to=FLOW_TERM),
)

Token = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Token (B, D) of the pair of frames (B, 3, H, W) and states (B, 2): before, now."""


class PushTs:
    """An arena of PushT.

    Attributes:
        coverage: Largest share of the goal covered so far (B,).
        solved: Whether an environment has reported success (B,); a solved one stands still.
    """

    def __init__(self, near_goal: bool, starts: int) -> None:
        self.envs: list[PushTEnv] = [make_env("environment_state_agent_pos") for _ in range(starts)]
        self.seen = [reset_to_start(env, seed, near_goal) for seed, env in enumerate(self.envs, FIRST_START)]
        self.coverage = np.array([env._get_coverage() for env in self.envs])
        self.solved = np.zeros(starts, bool)
        self.rendered: dict[int, np.ndarray] = {}

    @property
    def is_over(self) -> bool:
        return bool(self.solved.all())

    def observed(self) -> dict[str, Tensor]:
        """State (B, 2) and keypoints (B, 16), as recorded."""
        keys = {STATE: "agent_pos", ENV: "environment_state"}
        return {
            key: torch.from_numpy(np.stack([seen[name] for seen in self.seen])).float()
            for key, name in keys.items()
        }

    def frames(self) -> Tensor:
        """uint8 (B, 3, 96, 96), rendered once a step."""
        for i, env in enumerate(self.envs):
            if i not in self.rendered:
                self.rendered[i] = env._render()
        frames = np.stack([self.rendered[i] for i in range(len(self.envs))])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def step(self, actions: Tensor) -> None:
        for i, (env, action) in enumerate(zip(self.envs, actions.double().numpy(), strict=True)):
            if not self.solved[i]:
                self.seen[i], _, self.solved[i], _, info = env.step(action)
                self.coverage[i] = max(self.coverage[i], info["coverage"])
                self.rendered.pop(i, None)


@torch.no_grad()
def act(policy: DiffusionLamPolicy, windows: Windows, arena: Arena, steps: int, token: Token | None) -> None:
    """Let the policy act in all environments; its noise is the same for every policy of a shape."""
    torch.manual_seed(2)
    policy.reset()
    device = policy.config.device
    before: tuple[Tensor, Tensor] | None = None  # frames and states of the last tick
    for _ in range(steps):
        columns = arena.observed()
        batch = windows.live(columns, arena.frames)
        if token is not None:
            now = arena.frames(), columns[STATE]
            found = token(*(before or now), *now)
            batch["observation.lam_tokens"] = found if before else torch.zeros_like(found)
            before = now
        action = policy.select_action({key: value.to(device) for key, value in batch.items()})
        arena.step(windows.data.denormalize(ACTION, action.cpu()))
        if arena.is_over:
            return


def seen_by(
    which: str, lam: LamChoice, data: Recorded, work_dir: Path, device: str
) -> tuple[Tokens | None, Token | None]:
    """A condition's tokens in training, and how it comes by them in the arena."""
    if which == "stock":
        return None, None
    if which == "true state change":
        return lams.state_changes(data), lambda _, state, __, now: now - state
    how = {"folder": work_dir / "lams", "batch_size": LAM_BATCH, "preset": PRESET}
    tokens = lams.of_lam(lam, "vq", data, **how)
    if which == "shuffled":
        pool, generator = tokens.store.values[data.train_frames], torch.Generator().manual_seed(3)
        return lams.of_other_episodes(tokens, data), lambda before, *_: pool[
            torch.randint(len(pool), (len(before),), generator=generator)
        ]
    encoder = load_lam(lams.fitted(lam, data, **how), device=device)
    return tokens, lambda before, _, now, __: encoder.encode_pairs(before, now).of_kind(True).cpu()


def results_of(study: int, work_dir: Path) -> Results:
    return Results(work_dir / f"closed_loop_{study}.jsonl")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset.root", dest="root", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--study", type=int, choices=STUDIES, default=6)
    parser.add_argument(
        "--first_seed", type=int, default=20_000, help="of the recording, to recover keypoints"
    )
    parser.add_argument("--conditions", nargs="+", help="of the study; all if left out")
    parser.add_argument("--steps", type=int, help="of each training; the study's own if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    study, folder = STUDIES[args.study], args.work_dir / f"closed_loop_{args.study}"
    if unknown := set(args.conditions or ()) - study.conditions.keys():
        parser.error(f"--conditions: {sorted(unknown)} are not among {list(study.conditions)}")
    if args.device == "cuda":  # as lerobot-train does
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    folder.mkdir(parents=True, exist_ok=True)
    data = study.task.demonstrations(args.root, folder, args.first_seed)
    results = results_of(args.study, args.work_dir)
    budget = replace(study.budget, steps=args.steps or study.budget.steps)
    for seed in args.seeds:
        for condition in args.conditions or study.conditions:
            name = f"{condition}, {budget.steps} steps"
            if results.has(name, seed):
                continue
            started = time.perf_counter()
            n_obs_steps, which = study.conditions[condition]
            tokens, token = seen_by(which, study.lam, data, folder, args.device)
            windows = study.windows(data, n_obs_steps, budget.horizon, tokens, (0,))
            policy = train(windows, data.train_frames, budget, seed, args.device)
            trained = time.perf_counter() - started
            found = errors(policy, windows, budget, data.held_out_frames[:: budget.every])
            error = np.mean(found["error"])
            print(f"{name:<40} seed {seed}  error {error:.4f}  {trained:.0f} s of training", flush=True)
            arena = study.task.arena(STARTS)
            act(policy, windows, arena, study.task.longest, token)
            results.add(
                condition=name, seed=seed, success=arena.solved.tolist(), coverage=arena.coverage.tolist(),
                probe_r2=lams.probe_r2(tokens, data) if tokens else None, error=found["error"],
                seconds=round(time.perf_counter() - started), train_seconds=round(trained),
                device=args.device,
            )  # fmt: skip
            print(
                f"{name:<40} seed {seed}  success {arena.solved.mean():.2f}  "
                f"coverage {arena.coverage.mean():.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
