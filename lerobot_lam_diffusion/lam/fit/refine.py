"""Fit the FDM of a finished LAM further; encoder and codebook, hence all tokens, stay as they are."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lerobot_lam_diffusion.utils.errors import LamError

from ..preprocess import standardize
from ..villa_x import VillaXLam
from ..villa_x.decoder import Decoder
from .data import FitData, moving_pixels
from .motion_init import init_copying_decoder
from .recipe import FitRecipe
from .training import Training

REFINE_CHECKPOINT_FILE = "refine_checkpoint.pt"

_COPY_PAIRS = 2048
"""Pairs on which the error of copying is measured."""
_ENCODE_PAIRS = 128
_INIT_FRAMES = 1000
_PIXEL_PARTS = ("embed", "norm", "pred_head")
_AVERAGE_DECAY = 0.998


def copying_decoder(lam: VillaXLam, data: FitData, width: int, depth: int, seed: int) -> VillaXLam:
    """Return the same LAM with a new FDM that copies the earlier frame, ready to be refined.

    Args:
        lam: LAM whose encoder and codebook are kept.
        data: data whose frames are copied.
        width, depth: size of the new FDM; the channels of `width` beyond the first 30 or so are principal
            components that it can copy.
        seed: seed for its weights and for the choice of frames.
    """
    config = replace(lam.config, decoder_embed_dim=width, decoder_depth=depth)
    generator = torch.Generator().manual_seed(seed)
    pairs = data.fit_pairs()
    prev, _ = data.pair_frames(pairs[torch.randint(len(pairs), (_INIT_FRAMES,), generator=generator)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = Decoder(config)
        init_copying_decoder(decoder, standardize(prev))
    return VillaXLam(
        config,
        lam.modules | {"decoder": decoder},
        path=lam.path,
        revision=lam.revision,
        fingerprint=lam.fingerprint,
        device=lam.device,
    )


class DecoderRefinement(Training):
    """The FDM of a LAM in training.

    The loss is the mean absolute error over the moving pixels plus that over all pixels, each relative to the
    error of copying the previous frame. The weight of the second term grows from 0.1 to 1: moving parts are
    learned first, then still parts settle. The layers that map pixels in and out use a tenth of the learning
    rate; the result is a moving average of the weights.

    Args:
        lam: opened with its FDM, which is trained in place.
        recipe: its steps, batch size, seed, learning rate and warm-up count.
        data: frames and their division.

    Raises:
        LamError: the LAM has no FDM, or nothing moves in the frames.
    """

    title = "refine"
    checkpoint_file = REFINE_CHECKPOINT_FILE

    def __init__(self, lam: VillaXLam, recipe: FitRecipe, data: FitData):
        if lam.decoder is None:
            raise LamError(
                f"{lam.path} was opened without its FDM, expected it for refining. "
                "Open it with load_lam(path, fdm=True)."
            )
        super().__init__(recipe, data, lam.device)
        self.lam, self.decoder = lam, lam.decoder
        self.trained = [p for name, p in self.decoder.named_parameters() if name != "pe"]
        for parameter in self.trained:
            parameter.requires_grad_(True)
        of_pixels = [p for part in _PIXEL_PARTS for p in getattr(self.decoder, part).parameters()]
        others = [p for p in self.trained if not any(p is each for each in of_pixels)]
        groups = [{"params": others, "share": 1.0}, {"params": of_pixels, "share": 0.1}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        self.average = copy.deepcopy(self.decoder).requires_grad_(False)
        self.copy_error, self.moving_copy_error = self._copy_errors()
        self._tokens: Tensor | None = None

    def run(self, output_dir: Path, save_every: int, log: Callable[[str], None] = tqdm.write) -> None:
        super().run(output_dir, save_every, log)
        self.decoder.requires_grad_(False).load_state_dict(self.average.state_dict())
        # predict_next truncates to whole levels; half a level more makes that rounding.
        half = standardize(torch.full((3, 1, 1), 0.5)) - standardize(torch.zeros(3, 1, 1))
        self.decoder.pred_head.bias.view(-1, 3).add_(half.flatten().to(self.device))

    def take_step(self) -> dict[str, float]:
        """One optimiser step; returns both errors as shares of those of copying."""
        recipe = self.recipe
        rows = torch.randint(len(self.pairs), (recipe.batch_size,), generator=self._generator(self.step))
        terms = self._terms(*self._frames(self.pairs[rows]), self._all_tokens()[rows].to(self.device))
        self._descend((0.1 + 0.9 * self.step / recipe.steps) * terms["all"] + terms["moving"])
        # A short memory at first: the first weights are those of no training.
        decay = min(_AVERAGE_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.decoder.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        return {name: term.item() for name, term in terms.items()}

    def state(self) -> dict[str, Any]:
        return {"decoder": self.decoder.state_dict(), "average": self.average.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.decoder.load_state_dict(state["decoder"])
        self.average.load_state_dict(state["average"])

    def _terms(self, prev: Tensor, cur: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        patches = self.decoder(standardize(prev), tokens)
        error = (self.decoder.unpatch(patches) - standardize(cur)).abs().mean(1)
        moving = moving_pixels(prev, cur)
        moving_error = (error * moving).sum() / moving.sum().clamp(min=1)
        return {"all": error.mean() / self.copy_error, "moving": moving_error / self.moving_copy_error}

    @torch.no_grad()
    def _copy_errors(self) -> tuple[float, float]:
        """Mean absolute error of copying, in the normalised scale: over all pixels, over the moving ones."""
        rows = torch.randint(len(self.pairs), (_COPY_PAIRS,), generator=self._generator(-1))
        total = moving_total = torch.zeros((), dtype=torch.double)
        pixels = moving_pixels_ = 0
        for later in self.pairs[rows].split(_ENCODE_PAIRS):
            prev, cur = self.data.pair_frames(later)
            frames = [standardize(f) for f in (prev, cur)]
            error, moving = (frames[0] - frames[1]).abs().mean(1).double(), moving_pixels(prev, cur)
            total, moving_total = total + error.sum(), moving_total + error[moving].sum()
            pixels, moving_pixels_ = pixels + error.numel(), moving_pixels_ + int(moving.sum())
        if not moving_pixels_:
            raise LamError(
                f"Nothing moves in {len(rows)} frame pairs, {self.data.frame_stride} frames apart, expected "
                "motion to refine the FDM on. Use a larger frame_stride or other episodes."
            )
        return float(total / pixels), float(moving_total / moving_pixels_)

    def _all_tokens(self) -> Tensor:
        """VQ tokens of all pairs, (P, n·a): the encoder does not change, so it runs once."""
        if self._tokens is None:
            parts = tqdm(self.pairs.split(_ENCODE_PAIRS), desc="encode", unit="batch")
            encoded = (self.lam.encode_pairs(*self.data.pair_frames(later)) for later in parts)
            self._tokens = torch.cat([tokens.of_kind(True).cpu() for tokens in encoded])
        return self._tokens

    def _setting(self) -> dict[str, Any]:
        size = [self.lam.config.decoder_embed_dim, self.lam.config.decoder_depth]
        return {"lam": self.lam.fingerprint, "size": size}
