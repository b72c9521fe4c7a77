"""What a LAM is fitted to: the next frame through the FDM, and what changed through a small head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..preprocess import standardize
from ..quantizer import Quantizer
from ..villa_x.config import LamConfig
from ..villa_x.decoder import Decoder
from ..villa_x.encoder import Encoder
from .data import moving_pixels
from .recipe import GROUND, QUANTISE, FitRecipe


class ChangeHead(nn.Module):
    """The proprioceptive FDM: (state, token) → change of the state; not part of the saved LAM.

    Without a state, token → optical flow. Both sides are standardised by the given statistics.

    Args:
        term: name of its loss.
        weight: of its loss.
        token_dim: n·a.
        states: (S, W), or None.
        changes: (S, C), what tokens have to explain.
        least_spread: of the changes; less is noise.
    """

    state_mean: Tensor
    state_std: Tensor
    change_mean: Tensor
    change_std: Tensor

    def __init__(
        self,
        term: str,
        weight: float,
        token_dim: int,
        states: Tensor | None,
        changes: Tensor,
        least_spread: float = 0.0,
        hidden: int = 64,
    ):
        super().__init__()
        self.term, self.weight = term, weight
        inputs, outputs = token_dim + (0 if states is None else states.shape[1]), changes.shape[1]
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
        self.linear = nn.Linear(token_dim, outputs)
        for name, tensor, least in (("state", states, 0.0), ("change", changes, least_spread)):
            if tensor is not None:
                self.register_buffer(f"{name}_mean", tensor.mean(0))
                self.register_buffer(f"{name}_std", tensor.std(0).clamp(min=least) + 1e-6)

    def loss(self, tokens: Tensor, state: Tensor | None, change: Tensor) -> Tensor:
        """Mean squared standardised error; a constant prediction gives 1."""
        inputs = [tokens]
        if state is not None:
            inputs.append((state - self.state_mean) / self.state_std)
        predicted = self.linear(tokens) + self.layers(torch.cat(inputs, dim=1))
        return F.mse_loss(predicted, (change - self.change_mean) / self.change_std)


class FitModel(nn.Module):
    """A LAM in training."""

    def __init__(self, config: LamConfig, recipe: FitRecipe, change_head: ChangeHead | None):
        super().__init__()
        self.config, self.recipe = config, recipe
        self.encoder, self.vq, self.decoder = Encoder(config), Quantizer(config), Decoder(config)
        self.vq.requires_grad_(False)  # its rows follow moving averages
        self.change_head = change_head

    def encode(self, prev: Tensor, cur: Tensor) -> Tensor:
        """uint8 (B, 3, R, R) each → continuous tokens (B, n·a)."""
        return self.encoder(standardize(torch.stack([prev, cur], dim=1))).squeeze(1)

    def losses(
        self,
        prev: Tensor,
        cur: Tensor,
        state: Tensor | None,
        change: Tensor | None,
        phase: str,
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """The weighted terms of one step.

        Args:
            prev, cur: uint8 (B, 3, R, R).
            state, change: what the change head is given and has to predict, (B, W) and (B, C); None for none.
            phase: a phase of the recipe.
            generator: CPU generator for the noise.

        Returns:
            Terms to sum; the continuous tokens (B, n·a); the chosen indices (B, n), None before quantisation.
        """
        recipe = self.recipe
        tokens = self.encode(prev, cur)
        terms = {"penalty": recipe.token_penalty * tokens.square().mean()}
        indices = None
        if phase == QUANTISE:
            indices = self.vq.indices(tokens)
            rows = self.vq.rows(indices)
            terms["commit"] = recipe.commitment * F.mse_loss(tokens, rows)
            latents = tokens + (rows - tokens).detach()  # gradients pass straight through
        else:
            noise = torch.randn(tokens.shape, generator=generator).to(tokens.device)
            latents = tokens + recipe.noise * noise
        head = self.change_head
        if head is not None:
            assert change is not None
            terms[head.term] = head.weight * head.loss(latents, state, change)
        if phase != GROUND:
            terms["pixels"] = self._pixel_loss(prev, cur, latents)
        return terms, tokens, indices

    def _pixel_loss(self, prev: Tensor, cur: Tensor, latents: Tensor) -> Tensor:
        """Mean square error of the next frame, normalised scale, moving pixels weighing more."""
        patches = self.decoder(standardize(prev), latents)
        error = (self.decoder.unpatch(patches) - standardize(cur)).square().mean(1)
        weights = 1 + self.recipe.moving_weight * moving_pixels(prev, cur).float()
        return (error * weights).mean() / weights.mean()
