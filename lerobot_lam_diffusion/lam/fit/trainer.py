"""Fit a LAM of the villa-X architecture."""

from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.utils.errors import LamError

from ..preprocess import standardize
from ..villa_x.config import LamConfig
from .codebook import CodebookAverages, kmeans
from .data import FitData, moving_axes
from .flow import mean_flow
from .motion_init import init_decoder, init_encoder
from .objective import ChangeHead, FitModel
from .recipe import FLOW_TERM, QUANTISE, STATE_TERM, FitRecipe
from .training import Training

CHECKPOINT_FILE = "fit_checkpoint.pt"

_INIT_PAIRS = 256
_SAMPLE_PAIRS = 4096
"""The codebook and the statistics of the optical flow are initialised from these."""
_LEAST_FLOW = 0.01
"""Standard deviation of the flow, in pixels, below which it is noise."""
_RESTART_EVERY = 50
_RESTART_UNTIL = 0.8
"""Share of the steps after which no dead row is restarted, so that the last ones can settle."""


class Fit(Training):
    """A LAM being fitted.

    Args:
        config: the model's size.
        recipe: how to fit.
        data: what to fit to.
        device: where.
    """

    title = "fit"
    checkpoint_file = CHECKPOINT_FILE

    def __init__(
        self, config: LamConfig, recipe: FitRecipe, data: FitData, device: torch.device | str = "cpu"
    ):
        super().__init__(recipe, data, device)
        self.config = config
        torch.manual_seed(recipe.seed)
        self.model = FitModel(config, recipe, self._change_head()).to(self.device)
        self._init_from_data()
        self.averages = CodebookAverages(self.model.vq, recipe.codebook_decay)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, betas=(0.9, 0.98), weight_decay=0.01)

    def take_step(self) -> dict[str, float]:
        step, recipe, generator = self.step, self.recipe, self._generator(self.step)
        if step == recipe.quantise_from:
            self._start_codebook()
        phase = recipe.phase(step, self.model.change_head is not None)
        later = self.pairs[torch.randint(len(self.pairs), (recipe.batch_size,), generator=generator)]
        prev, cur = self._frames(later)
        terms, tokens, indices = self.model.losses(
            prev, cur, *self._changes(later, prev, cur), phase, generator
        )
        self._descend(torch.stack(list(terms.values())).sum())
        if phase == QUANTISE:
            assert indices is not None
            restart = step % _RESTART_EVERY == 0 and step < _RESTART_UNTIL * recipe.steps
            slots = tokens.detach().reshape(-1, self.config.action_latent_dim)
            self.averages.update(slots, indices.flatten(), generator, restart)
        return {name: term.item() for name, term in terms.items()}

    def state(self) -> dict[str, Any]:
        averages = {"counts": self.averages.counts, "sums": self.averages.sums}
        return {"model": self.model.state_dict(), **averages}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.averages.counts, self.averages.sums = state["counts"], state["sums"]

    def _setting(self) -> dict[str, Any]:
        head = self.model.change_head
        return {"config": self.config.to_dict(), "tied_to": None if head is None else head.term}

    def _sample(self, count: int) -> Tensor:
        """`count` pairs to fit, the same ones every time (with repetition where there are fewer)."""
        return self.pairs[torch.randint(len(self.pairs), (count,), generator=self._generator(-1))]

    def _change_head(self) -> ChangeHead | None:
        recipe, dim = self.recipe, self.config.token_dim
        if recipe.state_weight and self.data.states is not None:
            changes = self.data.state_changes(self.pairs)
            if moving_axes(changes).any():
                return ChangeHead(STATE_TERM, recipe.state_weight, dim, self.data.states[self.pairs], changes)
        if not recipe.flow_weight:
            return None
        sample = self._sample(_SAMPLE_PAIRS)
        flows = torch.cat([mean_flow(*self._frames(chunk)) for chunk in sample.split(256)])
        if not flows.any():
            raise LamError(
                f"Nothing moves in {len(sample)} frame pairs, {self.data.frame_stride} frames apart, and "
                "there is no state that changes, expected motion to fit tokens to. Use a larger frame_stride "
                "or other episodes."
            )
        return ChangeHead(FLOW_TERM, recipe.flow_weight, dim, None, flows, _LEAST_FLOW)

    def _changes(self, later: Tensor, prev: Tensor, cur: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the change head is given and what it has to predict."""
        if self.model.change_head is None:
            return None, None
        if self.model.change_head.term == FLOW_TERM:
            return None, mean_flow(prev, cur)
        assert self.data.states is not None
        before = self.data.states[later - self.data.frame_stride].to(self.device)
        return before, self.data.state_changes(later).to(self.device)

    def _init_from_data(self) -> None:
        prev, cur = map(standardize, self._frames(self._sample(_INIT_PAIRS)))
        init_encoder(self.model.encoder, prev, cur)
        init_decoder(self.model.decoder, cur)

    @torch.no_grad()
    def _start_codebook(self) -> None:
        chunks = self._sample(_SAMPLE_PAIRS).split(256)
        tokens = torch.cat([self.model.encode(*self._frames(chunk)) for chunk in chunks])
        slots = tokens.reshape(-1, self.config.action_latent_dim)
        self.averages.start(kmeans(slots, self.config.n_codes, self._generator(-2)))
