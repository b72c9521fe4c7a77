"""LAMs fitted to the training episodes alone, their controls, and the tokens of all frames."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lerobot_lam_diffusion.lam import load_lam, save_lam
from lerobot_lam_diffusion.lam.fit.codebook import kmeans
from lerobot_lam_diffusion.lam.fit.data import FitData
from lerobot_lam_diffusion.lam.fit.flow import mean_flow
from lerobot_lam_diffusion.lam.fit.objective import FitModel
from lerobot_lam_diffusion.lam.fit.recipe import FLOW_TERM, PRESETS, STATE_TERM, FitRecipe
from lerobot_lam_diffusion.lam.fit.report import probe
from lerobot_lam_diffusion.lam.fit.trainer import Fit
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.layout import unknown_hashes

from .data import STATE, Recorded


@dataclass(frozen=True)
class LamChoice:
    """A LAM and how its tokens are taken.

    Attributes:
        steps: Of the fit; 0: its starting point, which the package computes from the data.
        tied_to: The term that the fit has beside that of the next frame: `STATE_TERM`, `FLOW_TERM` or none.
        is_random: Weights as PyTorch draws them, instead; the codebook still holds k-means centres.
        stride: Gap of a frame pair, in the fit and in the tokens.
    """

    steps: int
    tied_to: str | None = None
    is_random: bool = False
    stride: int = 1

    @property
    def name(self) -> str:
        kind = "random" if self.is_random else f"{self.tied_to or 'pixels'}_{self.steps}"
        return f"{kind}_stride{self.stride}"


@dataclass
class Tokens:
    """A token of each frame, joined by the package's own store.

    Attributes:
        store: `window(index, deltas, ahead=…)` gives (B, T, D); zeros where a token is missing.
        scale: What the policy divides them by.
        slots: n; each has D / n numbers.
    """

    store: TokenStore
    scale: float
    slots: int


def store_of(values: Tensor, data: Recorded, stride: int) -> TokenStore:
    """A token store in memory: (F, D), as precomputed."""
    return TokenStore(
        path=Path("memory"), provenance=None, kind="continuous", frame_stride=stride,
        token_dim=values.shape[1], values=values, codebook=None,
        episode_from=data.start, episode_to=data.stop, episode_row=data.start,
        episode_hash=unknown_hashes(len(data.start)),
    )  # fmt: skip


def fitted(choice: LamChoice, data: Recorded, folder: Path, batch_size: int, preset: str) -> Path:
    """The folder of a LAM, fitted first if it is not there; held-out episodes take no part."""
    path = folder / choice.name
    if (path / "model.safetensors").exists():
        return path
    started = time.process_time()
    states = data.columns[STATE] if choice.tied_to == STATE_TERM else None
    flow_weight = float(choice.tied_to == FLOW_TERM)
    recipe = FitRecipe(steps=max(choice.steps, 1), batch_size=batch_size, flow_weight=flow_weight)
    fit = Fit(
        PRESETS[preset], recipe, FitData(data.frames, data.episode, states, choice.stride, data.held_out)
    )
    if choice.is_random:
        torch.manual_seed(0)
        fit.model = FitModel(PRESETS[preset], recipe, None)
    path.mkdir(parents=True, exist_ok=True)
    if choice.steps:
        fit.run(path, save_every=choice.steps)
        (path / "fit_checkpoint.pt").unlink()
    else:
        _start_codebook(fit)
    model = fit.model
    save_lam(path, PRESETS[preset], model.encoder, model.vq, model.decoder)
    print(f"LAM {choice.name}: {time.process_time() - started:.0f} CPU-seconds", flush=True)
    return path


@torch.no_grad()
def _start_codebook(fit: Fit) -> None:
    generator = torch.Generator().manual_seed(0)
    later = fit.pairs[torch.randint(len(fit.pairs), (2048,), generator=generator)]
    tokens = torch.cat([fit.model.encode(*fit.data.pair_frames(part)) for part in later.split(256)])
    slots = tokens.unflatten(1, (-1, fit.config.action_latent_dim)).flatten(0, 1)
    fit.model.vq.embedding.weight.copy_(kmeans(slots, fit.config.n_codes, generator))


def encoded(choice: LamChoice, data: Recorded, folder: Path, batch_size: int, preset: str) -> dict:
    """`vq` and `continuous` tokens of all frames (F, D), and `scale`; computed once."""
    lam_path = fitted(choice, data, folder, batch_size, preset)
    cached = lam_path / "tokens.pt"
    if not cached.exists():
        started, lam = time.process_time(), load_lam(lam_path)
        dim = lam.token_dim
        tokens = {kind: torch.zeros(len(data.episode), dim) for kind in ("vq", "continuous")}
        in_episode = torch.arange(len(data.episode)) - data.start[data.episode]
        for later in torch.nonzero(in_episode >= choice.stride).flatten().split(256):
            found = lam.encode_pairs(data.frames[later - choice.stride], data.frames[later])
            for kind, values in tokens.items():
                values[later] = found.of_kind(kind == "vq")
        torch.save({**tokens, "scale": lam.token_scale, "slots": lam.num_learned_tokens}, cached)
        print(f"tokens of {choice.name}: {time.process_time() - started:.0f} CPU-seconds", flush=True)
    return torch.load(cached, weights_only=True)


def of_lam(choice: LamChoice, kind: str, data: Recorded, **how) -> Tokens:
    """Tokens of a LAM; kind `vq`, `continuous` or `standardized` (continuous, mean 0 and spread 1)."""
    found = encoded(choice, data, **how)
    if kind != "standardized":
        return Tokens(store_of(found[kind], data, choice.stride), found["scale"], found["slots"])
    values = found["continuous"]
    train = values[data.train_frames]
    values = (values - train.mean(0)) / train.std(0).clamp(min=1e-6)
    return Tokens(store_of(values, data, choice.stride), 1.0, found["slots"])


def state_changes(data: Recorded, stride: int = 1) -> Tokens:
    """What no camera could tell better: the true change of the state over the pair, as a token."""
    states, before = data.columns[STATE], _before(data, stride)
    return _scaled(states - states[before], data, stride)


def flows(data: Recorded, stride: int = 1) -> Tokens:
    """What a fit without a state ties its tokens to, as a token of its own: no LAM at all."""
    pairs = zip(_before(data, stride).split(256), data.frames.split(256), strict=True)
    chunks = [mean_flow(data.frames[before], now) for before, now in pairs]
    return _scaled(torch.cat(chunks), data, stride)


def _before(data: Recorded, stride: int) -> Tensor:
    """The frame `stride` before each one, or the first of its episode (F,)."""
    return data.window(torch.arange(len(data.episode)), [-stride])[0][:, 0]


def _scaled(values: Tensor, data: Recorded, stride: int) -> Tokens:
    scale = math.sqrt(float(values[data.train_frames].square().mean()))
    return Tokens(store_of(values, data, stride), scale, 1)


def beside(one: Tokens, other: Tokens, data: Recorded, stride: int = 1) -> Tokens:
    """Both, each on its own scale."""
    values = torch.cat([one.store.values / one.scale, other.store.values / other.scale], dim=1)
    return Tokens(store_of(values, data, stride), 1.0, 1)


def of_other_episodes(tokens: Tokens, data: Recorded) -> Tokens:
    """Control: each frame has the token of a random frame of another episode on its side of the split."""
    generator, values = torch.Generator().manual_seed(0), torch.zeros_like(tokens.store.values)
    has_token = torch.arange(len(data.episode)) - data.start[data.episode] >= tokens.store.frame_stride
    for side in (data.train_frames, data.held_out_frames):
        pool = side[has_token[side]]
        if len(data.episode[pool].unique()) < 2:
            raise ValueError("tokens of other episodes need two episodes on each side of the split")
        chosen = pool[torch.randint(len(pool), (len(side),), generator=generator)]
        while (same := data.episode[chosen] == data.episode[side]).any():
            chosen[same] = pool[torch.randint(len(pool), (int(same.sum()),), generator=generator)]
        values[side] = tokens.store.values[chosen]
    return replace(tokens, store=store_of(values, data, tokens.store.frame_stride))


def probe_r2(tokens: Tokens, data: Recorded) -> float:
    """The fit report's verdict: held-out R² of the state's change, by ridge regression from the tokens."""
    frames, stride = torch.arange(len(data.episode)), tokens.store.frame_stride
    pairs = frames[frames - data.start[data.episode] >= stride]
    train, held_out = (pairs[torch.isin(pairs, side)] for side in (data.train_frames, data.held_out_frames))
    states, values = data.columns[STATE], tokens.store.values
    change = lambda later: states[later] - states[later - stride]  # noqa: E731
    return probe(values[train], change(train), values[held_out], change(held_out)).token
