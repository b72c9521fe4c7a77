"""The story of `lerobot-lam-demo`: record, precompute, train, look. Each step is a command to repeat."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import TextIO

from lerobot_lam_diffusion.demo.commands import (
    fit_command,
    precompute_command,
    record_command,
    train_command,
)
from lerobot_lam_diffusion.demo.console import output_to
from lerobot_lam_diffusion.demo.episode_look import look_at_episode
from lerobot_lam_diffusion.demo.picture import draw_picture
from lerobot_lam_diffusion.demo.record import RecordSummary, record_pusht
from lerobot_lam_diffusion.demo.running import (
    LiveLine,
    Progress,
    losses,
    run_logged,
    token_progress,
    training_progress,
)
from lerobot_lam_diffusion.scripts.next_step import shell_text
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.utils.errors import DemoError

_AVERAGED_STEPS = 10  # of the loss at the start and at the end


@dataclass(frozen=True)
class Demo:
    """What the demo makes, and where; the last episode is held out of training for the picture."""

    folder: Path
    num_episodes: int
    first_seed: int
    steps: int
    seed: int
    lam_path: str
    lam_revision: str | None
    device: str
    repo_id: str = "local/pusht"

    @property
    def dataset(self) -> Path:
        return self.folder / "pusht"

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def training(self) -> Path:
        return self.folder / "train"

    @property
    def checkpoint(self) -> Path:
        return self.training / "checkpoints" / "last" / "pretrained_model"

    @property
    def picture(self) -> Path:
        return self.folder / "lam_demo.png"

    @property
    def held_out(self) -> int:
        return self.num_episodes - 1


@dataclass
class Table:
    """What was made, printed at the end."""

    rows: list[tuple[str, str, float | None]] = field(default_factory=list)

    def add(self, name: str, facts: str, seconds: float | None = None) -> None:
        self.rows.append((name, facts, seconds))

    def __str__(self) -> str:
        width = max(len(facts) for _, facts, _ in self.rows)
        total = sum(seconds for *_, seconds in self.rows if seconds is not None)
        lines = [
            f"  {name:<11}{facts:<{width}}{'' if seconds is None else f'{seconds:8.0f} s'}".rstrip()
            for name, facts, seconds in self.rows
        ]
        rule = "  " + "-" * (11 + width + 10)
        return "\n".join([rule, *lines, rule, f"  {'':<11}{'all steps':<{width}}{total:8.0f} s"])


def tell_story(demo: Demo, console: TextIO) -> None:
    """Run the whole demo; `demo.folder` must be empty or not exist."""
    _Story(demo, console).tell()


class _Story:
    """The four steps in order; each adds to the table what it made."""

    def __init__(self, demo: Demo, console: TextIO) -> None:
        self._demo = demo
        self._console = console
        self._table = Table()

    def tell(self) -> None:
        demo = self._demo
        self._say(
            f"LAM tokens for a diffusion policy: PushT, offline (HF_HUB_OFFLINE=1), into {demo.folder}/"
        )
        self._say("Here you see each command; what it prints itself goes to a .log beside what it makes.")
        self._record()
        store = self._precompute()
        found = self._train()
        self._look(store, found)
        self._say(f"\nWhat was made in {demo.folder}/\n\n{self._table}\n\n{what_next(demo)}")

    def _record(self) -> None:
        demo = self._demo
        self._heading(1, "Record: a planning expert pushes the T onto its target")
        plan = (demo.dataset, demo.repo_id, demo.num_episodes, True, demo.first_seed)
        self._show(record_command(*plan))
        started = time.perf_counter()
        facts = recorded_text(record(*plan))
        self._done("dataset", f"{facts}, {_size(demo.dataset) / 1e6:.1f} MB", started)

    def _precompute(self) -> TokenStore:
        demo = self._demo
        self._heading(2, "Precompute: the LAM turns each frame pair into a token")
        command = precompute_command(
            demo.repo_id, demo.dataset, demo.lam_path, demo.lam_revision, demo.tokens, demo.device
        )
        self._show(command)
        started = time.perf_counter()
        self._run(command, log_of(demo.tokens), token_progress)
        store = TokenStore.open(demo.tokens)
        first, *more = token_facts(store)
        self._done("tokens", first, started)
        self._add(*more)
        self._say("\n  A LAM of your own, fitted to the same frames (not run here, it takes its time):\n")
        self._show(fit_command(demo.repo_id, demo.dataset, demo.folder / "my_lam"))
        return store

    def _train(self) -> list[float]:
        demo = self._demo
        self._heading(3, f"Train: stock lerobot-train, a small network; episode {demo.held_out} is held out")
        command = train_command(
            demo.repo_id,
            demo.dataset,
            range(demo.held_out),
            demo.tokens,
            demo.training,
            demo.steps,
            demo.seed,
            demo.device,
        )
        self._show(command)
        log = log_of(demo.training)
        started = time.perf_counter()
        self._run(command, log, training_progress)
        found = losses(log.read_text(errors="replace"))
        if not found:
            raise DemoError(
                f"lerobot-train ended well but {log} holds no loss, expected one a step: its log lines "
                "are not those of LeRobot 0.6. Install lerobot>=0.6.1,<0.7"
            )
        self._done("policy", loss_facts(found), started)
        self._add(f"checkpoint {demo.checkpoint}")
        return found

    def _look(self, store: TokenStore, found: list[float]) -> None:
        demo = self._demo
        self._heading(4, f"Look: what the tokens say about episode {demo.held_out}")
        started = time.perf_counter()
        with output_to(log_of(demo.picture.with_suffix(""))):
            look = look_at_episode(
                demo.dataset, demo.repo_id, demo.held_out, store, demo.lam_path, demo.lam_revision
            )
            draw_picture(look, found, demo.picture)
        moving, moving_copy = (100 * error for error in look.moving_errors)
        whole, whole_copy = 100 * look.fdm_error.mean(), 100 * look.copy_error.mean()
        self._done("picture", str(demo.picture), started)
        self._add(
            f"next frame, mean error with the token: {moving:.1f} % on moving pixels, {whole:.1f} % on all",
            f"if nothing moved: {moving_copy:.1f} % on moving pixels, {whole_copy:.1f} % on all",
        )

    def _run(self, command: list[str], log: Path, progress_of: Callable[[str], Progress | None]) -> None:
        with LiveLine(self._console) as line:
            run_logged(command, log, progress_of, line)

    def _done(self, name: str, facts: str, started: float) -> None:
        seconds = time.perf_counter() - started
        self._say(f"  done in {seconds:.0f} s: {facts}")
        self._table.add(name, facts, seconds)

    def _add(self, *facts: str) -> None:
        for fact in facts:
            self._table.add("", fact)

    def _heading(self, number: int, text: str) -> None:
        self._say(f"\n[{number}/4] {text}\n")

    def _show(self, command: list[str]) -> None:
        self._say(f"{indent(shell_text(command), '  ')}\n")

    def _say(self, text: str) -> None:
        print(text, file=self._console, flush=True)


def record(root: Path, repo_id: str, num_episodes: int, near_goal: bool, first_seed: int) -> RecordSummary:
    """`lerobot-lam-demo --record_only=true`: the expert's episodes, with one line of progress.

    Raises:
        FileExistsError: `root` holds something already.
    """
    with output_to(log_of(root)) as terminal, LiveLine(terminal) as line:
        line.show(None)
        return record_pusht(
            root,
            repo_id,
            num_episodes,
            near_goal=near_goal,
            first_seed=first_seed,
            progress=lambda done, total: line.show(Progress(done, total, "episodes")),
        )


def recorded_text(summary: RecordSummary) -> str:
    text = f"{summary.num_episodes} episodes, {summary.num_frames:,} frames"
    failed = len(summary.failed_seeds)
    return f"{text}, {failed} unsolved starts left out" if failed else text


def token_facts(store: TokenStore) -> list[str]:
    """What a whole store of VQ tokens holds, a line each."""
    assert store.codebook is not None
    frames = len(store.values)
    missing = int((store.episode_to - store.episode_from).clamp(max=store.frame_stride).sum())
    used = ", ".join(f"{perplexity:.1f}" for perplexity in store.code_perplexity())
    per_frame = store.values.element_size() * store.values.shape[1]
    as_floats = 4 * store.token_dim
    return [
        f"{frames - missing:,} tokens of {store.token_dim} numbers; {missing} first frames have none",
        f"perplexity {used} of {len(store.codebook)} codes a slot",
        f"{_size(store.path):,} bytes on disk: {per_frame} a frame and what describes them; "
        f"as float32 {as_floats * frames:,} ({as_floats} a frame)",
    ]


def loss_facts(found: list[float]) -> str:
    window = min(_AVERAGED_STEPS, max(1, len(found) // 2))
    first, last = (sum(part) / window for part in (found[:window], found[-window:]))
    return f"{len(found)} steps, loss {first:.3f} -> {last:.3f} (means of the first and last {window})"


def what_next(demo: Demo) -> str:
    """Commands to go on with."""
    commands = [
        ["lerobot-lam-tokens", "info", str(demo.tokens)],
        [
            "lerobot-lam-precompute",
            "--dataset.repo_id=YOU/DATASET",
            "--lam.path=microsoft/villa-x",
            "--camera_key=observation.images.top",
            "--frame_stride=3",
            "--output_dir=data/my_tokens",
        ],
        [
            "lerobot-train",
            "--policy.type=diffusion_lam",
            "--dataset.repo_id=YOU/DATASET",
            "--policy.use_precomputed_lam_tokens=true",
            "--policy.lam_tokens_path=data/my_tokens",
            "--policy.push_to_hub=false",
        ],
    ]
    texts = "\n\n".join(indent(shell_text(command), "  ") for command in commands)
    activate = "" if shutil.which("lerobot-train") else f" (first: export PATH={_bin_folder()}:$PATH)"
    steps = "look into the store, then do the same with your dataset and villa-X (stride 3: 0.1 s at 30 fps)"
    return f"Next{activate}: {steps}:\n\n{texts}"


def log_of(made: Path) -> Path:
    """The log beside what a step makes."""
    return made.with_name(f"{made.name}.log")


def _bin_folder() -> Path:
    return Path(sys.executable).parent


def _size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
