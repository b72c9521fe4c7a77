"""The training loop of fitting and refining: every step is a function of (seed, step).

A run that is resumed from a checkpoint therefore continues bit for bit.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lerobot_lam_diffusion.utils.errors import LamError
from lerobot_lam_diffusion.utils.files import whole_or_nothing

from .data import FitData
from .recipe import FitRecipe


class Training(ABC):
    """Takes optimiser steps, and saves and resumes their state.

    Args:
        recipe: Steps, batch size, seed and learning rate.
        data: Frames and their division.
        device: Where.

    Attributes:
        title: Of the progress bar.
        checkpoint_file: Name of the checkpoint in the output folder.
        step: How many steps have been taken.
        pairs: int64, the later frame of every pair to fit.
        trained: Parameters that the optimiser changes.
    """

    title: ClassVar[str]
    checkpoint_file: ClassVar[str]

    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def __init__(self, recipe: FitRecipe, data: FitData, device: torch.device | str) -> None:
        self.recipe, self.data = recipe, data
        self.device = torch.device(device)
        self.pairs = data.fit_pairs()
        self.step = 0

    @abstractmethod
    def take_step(self) -> dict[str, float]:
        """One optimiser step; returns the terms of the loss."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the step and the optimiser's state."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""

    @abstractmethod
    def _setting(self) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes, besides recipe and data."""

    def run(self, output_dir: Path, save_every: int, log: Callable[[str], None] = tqdm.write) -> None:
        """Take the remaining steps, with a progress bar, saving a checkpoint now and then."""
        steps = self.recipe.steps
        bar = tqdm(total=steps, initial=self.step, desc=self.title, unit="step", mininterval=1.0)
        smooth: dict[str, float] = {}
        while self.step < steps:
            for name, value in self.take_step().items():
                smooth[name] = 0.98 * smooth.get(name, value) + 0.02 * value
            bar.set_postfix({name: f"{value:.3f}" for name, value in smooth.items()}, refresh=False)
            bar.update()
            if self.step % save_every == 0 or self.step == steps:
                self.save(output_dir)
                numbers = ", ".join(f"{name} {value:.4f}" for name, value in smooth.items())
                log(f"step {self.step}: {numbers}")
        bar.close()

    def save(self, output_dir: Path) -> None:
        """Write the checkpoint atomically."""
        state = {
            "setting": self._setting_text(),
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            **self.state(),
        }
        with whole_or_nothing(output_dir / self.checkpoint_file, replace=True) as partial:
            torch.save(state, partial)

    def resume(self, output_dir: Path) -> None:
        """Continue from the checkpoint of `output_dir`.

        Raises:
            LamError: if there is none, or it belongs to another LAM, other settings or data.
        """
        path = output_dir / self.checkpoint_file
        if not path.is_file():
            raise LamError(f"{path} does not exist, expected the checkpoint to resume. Start without resume.")
        state = torch.load(path, map_location=self.device, weights_only=True)
        if json.loads(state["setting"]) != json.loads(self._setting_text()):
            raise LamError(
                f"{path} belongs to another LAM, other settings or data:\n  {state['setting']}\nexpected\n  "
                f"{self._setting_text()}\nResume with the settings and the version that it began "
                "with, or write into another folder."
            )
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.load_state(state)

    def _setting_text(self) -> str:
        setting = {**self._setting(), "recipe": asdict(self.recipe), "data": self.data.summary()}
        return json.dumps(setting)

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)

    def _descend(self, loss: Tensor) -> None:
        """One step of the optimiser; a group's learning rate is its `share` (default 1) of the recipe's."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("share", 1.0) * self.recipe.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.step += 1

    def _frames(self, later: Tensor) -> tuple[Tensor, Tensor]:
        prev, cur = self.data.pair_frames(later)
        return prev.to(self.device), cur.to(self.device)
