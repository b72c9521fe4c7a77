"""The training loop: every step is a function of (seed, step), so a resumed run continues bit for bit."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lerobot_lam_diffusion.utils.errors import LamError
from lerobot_lam_diffusion.utils.files import whole_or_nothing

from ..preprocess import standardize
from ..villa_x.config import LamConfig
from .codebook import CodebookAverages, kmeans
from .data import FitData
from .motion_init import init_decoder, init_encoder
from .objective import FitModel, StateHead
from .recipe import QUANTISE, FitRecipe

CHECKPOINT_FILE = "fit_checkpoint.pt"

_INIT_PAIRS = 256
_KMEANS_PAIRS = 4096
_RESTART_EVERY = 50
_RESTART_UNTIL = 0.8
"""Share of the steps after which no dead row is restarted, so that the last ones can settle."""


class Fit:
    """A LAM being fitted.

    Args:
        config: the model's size.
        recipe: how to fit.
        data: what to fit to.
        device: where.
    """

    def __init__(
        self, config: LamConfig, recipe: FitRecipe, data: FitData, device: torch.device | str = "cpu"
    ):
        self.config, self.recipe, self.data = config, recipe, data
        self.device = torch.device(device)
        self.pairs = data.fit_pairs()
        self.step = 0
        torch.manual_seed(recipe.seed)
        self.model = FitModel(config, recipe, self._state_head()).to(self.device)
        self._init_from_data()
        self.averages = CodebookAverages(self.model.vq, recipe.codebook_decay)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, betas=(0.9, 0.98), weight_decay=0.01)

    def run(self, output_dir: Path, save_every: int, log: Callable[[str], None] = tqdm.write) -> None:
        """Take the remaining steps, with a progress bar, saving a checkpoint now and then."""
        recipe = self.recipe
        bar = tqdm(total=recipe.steps, initial=self.step, desc="fit", unit="step", mininterval=1.0)
        smooth: dict[str, float] = {}
        while self.step < recipe.steps:
            if self.step == recipe.quantise_from:
                self._start_codebook()
            for name, value in self.take_step().items():
                smooth[name] = 0.98 * smooth.get(name, value) + 0.02 * value
            bar.update()
            if self.step % 50 == 0:
                phase = recipe.phase(self.step - 1, self.model.state_head is not None)
                bar.set_postfix_str(f"{phase} " + " ".join(f"{k} {v:.3f}" for k, v in smooth.items()))
            if self.step % save_every == 0 or self.step == recipe.steps:
                self.save(output_dir)
                numbers = ", ".join(f"{name} {value:.4f}" for name, value in smooth.items())
                log(f"step {self.step}: {numbers}")
        bar.close()

    def take_step(self) -> dict[str, float]:
        """One optimiser step; returns the terms of the loss."""
        recipe, generator = self.recipe, self._generator(self.step)
        phase = recipe.phase(self.step, self.model.state_head is not None)
        later = self.pairs[torch.randint(len(self.pairs), (recipe.batch_size,), generator=generator)]
        prev, cur = self._frames(later)
        terms, tokens, indices = self.model.losses(prev, cur, *self._states(later), phase, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.step)
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        if phase == QUANTISE:
            assert indices is not None
            restart = self.step % _RESTART_EVERY == 0 and self.step < _RESTART_UNTIL * recipe.steps
            slots = tokens.detach().reshape(-1, self.config.action_latent_dim)
            self.averages.update(slots, indices.flatten(), generator, restart)
        self.step += 1
        return {name: term.item() for name, term in terms.items()}

    def save(self, output_dir: Path) -> None:
        """Write the checkpoint atomically."""
        state = {
            "setting": self._setting(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.averages.counts,
            "sums": self.averages.sums,
        }
        with whole_or_nothing(output_dir / CHECKPOINT_FILE, replace=True) as partial:
            torch.save(state, partial)

    def resume(self, output_dir: Path) -> None:
        """Continue from the checkpoint of `output_dir`.

        Raises:
            LamError: if there is none, or it belongs to other settings or data.
        """
        path = output_dir / CHECKPOINT_FILE
        if not path.is_file():
            raise LamError(f"{path} does not exist, expected the checkpoint to resume. Start without resume.")
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["setting"] != self._setting():
            raise LamError(
                f"{path} belongs to a fit of other settings or data:\n  {state['setting']}\nexpected\n  "
                f"{self._setting()}\nResume with the settings it began with, or fit into another folder."
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averages.counts, self.averages.sums = state["counts"], state["sums"]

    def _setting(self) -> str:
        setting = {"config": self.config.to_dict(), "recipe": asdict(self.recipe)}
        return json.dumps({**setting, "data": self.data.summary()})

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)

    def _sample(self, count: int) -> Tensor:
        """`count` pairs to fit, the same ones every time (with repetition where there are fewer)."""
        return self.pairs[torch.randint(len(self.pairs), (count,), generator=self._generator(-1))]

    def _frames(self, later: Tensor) -> tuple[Tensor, Tensor]:
        prev, cur = self.data.pair_frames(later)
        return prev.to(self.device), cur.to(self.device)

    def _states(self, later: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.data.states is None:
            return None, None
        before = self.data.states[later - self.data.frame_stride].to(self.device)
        return before, self.data.state_changes(later).to(self.device)

    def _state_head(self) -> StateHead | None:
        if self.data.states is None or not self.recipe.state_weight:
            return None
        states = self.data.states[self.pairs]
        return StateHead(self.config.token_dim, states, self.data.state_changes(self.pairs))

    def _init_from_data(self) -> None:
        prev, cur = map(standardize, self._frames(self._sample(_INIT_PAIRS)))
        init_encoder(self.model.encoder, prev, cur)
        init_decoder(self.model.decoder, cur)

    @torch.no_grad()
    def _start_codebook(self) -> None:
        chunks = self._sample(_KMEANS_PAIRS).split(256)
        tokens = torch.cat([self.model.encode(*self._frames(chunk)) for chunk in chunks])
        slots = tokens.reshape(-1, self.config.action_latent_dim)
        self.averages.start(kmeans(slots, self.config.n_codes, self._generator(-2)))
