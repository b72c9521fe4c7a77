"""The report's sections, in the order of the questions that they answer."""

from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lerobot_lam_diffusion.lam.fit.data import moving_pixels
from lerobot_lam_diffusion.lam.fit.report import evenly, perplexity
from lerobot_lam_diffusion.lam.resize import bilinear
from lerobot_lam_diffusion.report import figures
from lerobot_lam_diffusion.report.codes import BINS, read_codes
from lerobot_lam_diffusion.report.frames import (
    THUMB,
    Entry,
    Footage,
    choose_examples,
    choose_pool,
    decode_frames,
)
from lerobot_lam_diffusion.report.motion import (
    STATE_KEY,
    StateProbe,
    dimension_names,
    probe_state,
    read_states,
)
from lerobot_lam_diffusion.report.page import Group, Picture, Section, write_page
from lerobot_lam_diffusion.report.verdict import Verdict, judge
from lerobot_lam_diffusion.tokens.card import PICTURE_PREFIX, CardPicture
from lerobot_lam_diffusion.tokens.described import described
from lerobot_lam_diffusion.tokens.store import TokenStore

_STRIPS, _STRIP_FRAMES = 3, 8
_PREDICTED, _PREDICTED_SHOWN = 96, 6


class Report(NamedTuple):
    verdict: Verdict
    sections: list[Section]


def write_report(store: TokenStore, footage: Footage | None, output: Path, seed: int = 0) -> Verdict:
    """Analyse a store and write the page; for the arguments see `build_report`."""
    verdict, sections = build_report(store, footage, seed)
    name = store.provenance.dataset.repo_id if store.provenance is not None else store.path.name
    write_page(output, name, verdict, sections)
    return verdict


def card_pictures(store: TokenStore, footage: Footage | None) -> tuple[Verdict, list[CardPicture]]:
    """The report's main pictures for the card of a store's repository: the first of each section."""
    verdict, sections = build_report(store, footage)
    pictures = []
    for section in sections:
        shown = [picture for group in section.groups for picture in group.pictures][: section.on_card]
        for number, picture in enumerate(shown, start=1):
            name = f"{PICTURE_PREFIX}{section.name}_{number}.{picture.kind.replace('jpeg', 'jpg')}"
            pictures.append(CardPicture(name, picture.data, picture.caption or picture.alt))
    return verdict, pictures


def build_report(store: TokenStore, footage: Footage | None, seed: int = 0) -> Report:
    """Analyse a store.

    Args:
        store: a store of any kind and coverage.
        footage: if None, only the parts that need neither frames nor state are built.
        seed: seed for the held-out episodes and for all choices of examples.
    """
    analysis = _Analysis(store, footage, seed)
    verdict = judge(analysis.probe, store.code_perplexity(), analysis.why_no_probe)
    return Report(verdict, analysis.sections())


class _Analysis:
    """What several sections share."""

    def __init__(self, store: TokenStore, footage: Footage | None, seed: int):
        self.store, self.footage, self.seed = store, footage, seed
        covered = set(store.covered_episodes)
        if footage is not None and footage.dataset.episodes is not None:
            covered &= set(footage.dataset.episodes)
        self.codes = read_codes(store, sorted(covered), seed)
        self.states = None if footage is None else read_states(footage.dataset)
        self.changes: Tensor | None = None  # (M, S), of the state over each pair of `codes`
        self.names: list[str] = []
        self.probe: StateProbe | None = None
        if footage is not None and self.states is not None:
            frames = self.codes.frames
            self.names = dimension_names(footage.dataset.meta.features[STATE_KEY], "state")
            self.changes = self.states[frames] - self.states[frames - store.frame_stride]
            self.probe = probe_state(store, self.codes, self.changes, self.names, seed)

    @property
    def why_no_probe(self) -> str:
        if self.footage is None:
            return "the report was made without the dataset, whose state the tokens are compared with"
        if self.states is None:
            return "the dataset has no observation.state to compare the tokens with"
        return "the state of fewer than two episodes with tokens changes"

    def sections(self) -> list[Section]:
        if self.footage is None or not len(self.codes.frames):
            return [self._probe_section(), self._usage_section(), self._provenance_section()]
        pool = choose_pool(self.codes, self.probe.held_out if self.probe is not None else [], self.seed)
        entries, num_occurring = choose_examples(self.codes, pool, self.seed)
        strips = {
            episode: self._strip_frames(episode)
            for episode in pool[:: max(1, len(pool) // _STRIPS)][:_STRIPS]
        }
        later = [frame for entry in entries for frame in entry.examples]
        earlier = [frame - self.store.frame_stride for frame in later]
        wanted = chain(earlier, later, *strips.values())
        thumbs = decode_frames(self.footage, wanted, partial(bilinear, size=THUMB))
        return [
            self._probe_section(),
            self._atlas_section(entries, num_occurring, thumbs),
            self._usage_section(),
            self._strip_section(strips, thumbs),
            *([self._prediction_section(self.footage, pool)] if self.footage.lam is not None else []),
            self._provenance_section(),
        ]

    def _probe_section(self) -> Section:
        section = Section("Do the tokens say what moved?", "probe", on_card=1)
        probe = self.probe
        if probe is None:
            section.texts.append(f"Unknown: {self.why_no_probe}.")
            return section
        section.texts.append(
            f"A ridge regression from each pair's token to the change of the state over it, measured on "
            f"{len(probe.held_out)} episodes that it was not fitted to ({len(probe.measured):,} pairs). "
            "R² 1: the token says all; 0: no more than the mean. Shuffled: tokens of other pairs. The LAM "
            "itself may have been fitted to these episodes."
        )
        if probe.still:
            section.texts.append(
                "Left out, since they do not change in the fitted or in the measured pairs: "
                f"{', '.join(probe.still)}."
            )
        per_dimension = ", ".join(
            f"{n} {r:.2f}" for n, r in list(zip(probe.names, probe.token, strict=True))[:20]
        )
        text = f"Bars: R² of each state dimension from its token: {per_dimension}"
        scatters = [
            Picture(
                figures.probe_scatter(probe, axis),
                f"Scatter: measured change of {probe.names[axis]} against the predicted one",
                f"The {word} dimension",
            )
            for word, axis in (("best", probe.best), ("worst", int(np.argmin(probe.token))))
        ]
        section.groups = [
            Group([Picture(figures.probe_bars(probe), text)]),
            Group(scatters[: len(probe.names)], look="grid"),
        ]
        return section

    def _atlas_section(self, entries: list[Entry], num_occurring: int, thumbs: dict[int, Tensor]) -> Section:
        codes, stride = self.codes, self.store.frame_stride
        section = Section("What does each code mean?", "codes", on_card=3)
        section.texts.append(
            "Each column of a picture is a frame pair: the earlier frame, the later one, their difference. "
            "Pairs come out of different episodes where there are as many; frames are square, as for the LAM."
        )
        if not codes.is_vq:
            section.texts.append(
                "The tokens are continuous: what stands for a code is the place along a principal direction, "
                f"in {BINS} bins that hold equally many tokens."
            )
        shown = [entry for entry in entries if entry.examples]
        if num_occurring > len(shown):
            section.texts.append(
                f"Shown: {len(shown)} of the most frequent of {num_occurring} codes that occur."
            )
        pictures: dict[int, list[Picture]] = {}
        for entry in shown:
            name = f"{'code' if codes.is_vq else 'bin'} {entry.code}"
            pairs = [(thumbs[frame - stride], thumbs[frame]) for frame in entry.examples]
            picture = Picture(
                figures.pair_tiles(pairs),
                f"{len(pairs)} frame pairs with {name} in {codes.slots[entry.slot]}, and their differences",
                f"{name}: {entry.share:.1%}{self._mean_change(entry)}",
            )
            pictures.setdefault(entry.slot, []).append(picture)
        section.groups = [Group(found, codes.slots[slot], "grid") for slot, found in pictures.items()]
        return section

    def _usage_section(self) -> Section:
        codes, store = self.codes, self.store
        section = Section("Are they used?", "use", on_card=2)
        rows = len(store.values)
        missing = rows - store.num_tokens
        section.rows = [
            ("frames without a token", f"{missing:,} of {rows:,} ({missing / max(rows, 1):.1%})"),
            ("coverage", store.coverage),
        ]
        if codes.drawn:
            section.texts.append(
                f"The store is large: looked at are {len(codes.frames):,} frames of episodes drawn at random."
            )
        if not len(codes.frames):
            return section
        if codes.is_vq:
            for slot, name in enumerate(codes.slots):
                used = int((codes.shares(slot) > 0).sum())
                alike = perplexity(codes.labels[:, slot], codes.num_codes)
                section.rows.append((name, f"{used} of {codes.num_codes} codes, perplexity {alike:.1f}"))
            bars = Picture(
                figures.usage_bars(codes),
                "Bars: share of the tokens that has each code, a slot above the other",
                "Share of each code; dashed: all codes used alike.",
            )
            section.groups.append(Group([bars]))
        maps = Picture(
            figures.transition_maps(codes),
            "Maps: which code follows which, a map for each slot",
            "What follows each code, one frame later. A bright diagonal: motion goes on as it was.",
        )
        section.groups.append(Group([maps]))
        return section

    def _strip_section(self, strips: dict[int, list[int]], thumbs: dict[int, Tensor]) -> Section:
        section = Section("Where in time?", "time", on_card=2)
        section.texts.append(
            "Frames, codes (a colour each; white: no token) and the state's speed of some episodes."
        )
        for episode, frames in strips.items():
            strip = figures.jpeg(torch.cat([thumbs[frame] for frame in frames], dim=2))
            pictures = [
                Picture(strip, f"{len(frames)} frames of episode {episode}, evenly over its time"),
                Picture(
                    self._strip_chart(episode),
                    f"Chart: codes and speed of the state of episode {episode} over time",
                ),
            ]
            section.groups.append(Group(pictures, f"Episode {episode}", "strip"))
        return section

    def _prediction_section(self, footage: Footage, pool: list[int]) -> Section:
        """On the probe's held-out episodes, or without a probe drawn ones; the LAM may have seen them."""
        lam, stride = footage.lam, self.store.frame_stride
        section = Section("What does the LAM predict?", "prediction", on_card=2)
        which, held = "drawn", pool[: max(1, len(pool) // 5)]
        if self.probe is not None:
            which, held = "held-out", self.probe.held_out
        inside = torch.isin(self.codes.episodes, torch.tensor(sorted({*held} & {*pool})))
        later = evenly(self.codes.frames[inside], _PREDICTED)
        if not len(later):
            section.texts.append(f"No {which} episode has a token.")
            return section
        frames = [*(later - stride).tolist(), *later.tolist()]
        found = decode_frames(footage, frames, lambda chunk: lam.resize_frames(chunk).cpu())
        prev, cur = torch.stack([found[frame] for frame in frames]).chunk(2)
        tokens = self.store.window(later, [0])[:, 0]
        parts = zip(prev.split(16), tokens.split(16), strict=True)
        predicted = torch.cat([lam.predict_next(*part).cpu() for part in parts])
        moving = moving_pixels(prev, cur)
        error, copying = ((frames.float() - cur.float()).abs().mean(1) / 255 for frames in (predicted, prev))
        section.rows = [
            ("all pixels, mean error", f"{error.mean():.2%}, copying the frame before {copying.mean():.2%}")
        ]
        if moving.any():
            own, copied = error[moving].mean(), copying[moving].mean()
            section.rows.append(
                ("moving pixels, mean error", f"{own:.1%}, copying the frame before {copied:.1%}")
            )
        section.texts.append(
            f"The LAM's forward model (FDM) gets the earlier frame and the token; {len(later)} pairs of "
            f"{which} episodes, which the LAM may have been fitted to. Below, those in which most moves: the "
            "earlier frame (as copying gives it), the prediction, and the true frame."
        )
        episodes = self.codes.episodes[torch.searchsorted(self.codes.frames, later)]
        pictures = [
            Picture(
                figures.jpeg(torch.cat([prev[at], predicted[at], cur[at]], dim=2)),
                f"Frame {int(later[at])} of the dataset: earlier frame, predicted frame, true frame",
                f"episode {int(episodes[at])}: earlier · predicted · true",
            )
            for at in moving.flatten(1).sum(1).argsort(descending=True)[:_PREDICTED_SHOWN].tolist()
        ]
        section.groups.append(Group(pictures, look="grid"))
        return section

    def _provenance_section(self) -> Section:
        section = Section("What is this?", "provenance", rows=[("store", self.store.name)])
        if self.store.provenance is None:
            section.rows.append(("provenance", "none: a .pt file does not say what its tokens are"))
        else:
            section.rows += described(self.store).items()
        section.rows.append(("seed of this report", str(self.seed)))
        return section

    def _mean_change(self, entry: Entry) -> str:
        if self.changes is None:
            return ""
        change = self.changes[self.codes.labels[:, entry.slot] == entry.code].mean(0)
        size = change.abs() / (self.changes.std(0) + 1e-12)
        most = size.argsort(descending=True)[:3].sort().values.tolist()
        return "; mean change " + ", ".join(f"{self.names[axis]} {float(change[axis]):+.3g}" for axis in most)

    def _bounds(self, episode: int) -> tuple[int, int]:
        return int(self.store.episode_from[episode]), int(self.store.episode_to[episode])

    def _strip_frames(self, episode: int) -> list[int]:
        start, stop = self._bounds(episode)
        return np.linspace(start, stop - 1, min(_STRIP_FRAMES, stop - start)).astype(int).tolist()

    def _strip_chart(self, episode: int) -> bytes:
        assert self.footage is not None
        (start, stop), fps = self._bounds(episode), self.footage.dataset.fps
        own = self.codes.episodes == episode
        labels = torch.full((stop - start, len(self.codes.slots)), -1)
        labels[self.codes.frames[own] - start] = self.codes.labels[own]
        speed = None
        if self.states is not None and self.changes is not None:
            steps = self.states[start:stop].diff(dim=0, prepend=self.states[start : start + 1])
            speed = (steps / (self.changes.std(0) + 1e-12)).norm(dim=1) * fps
        seconds = np.arange(stop - start) / fps
        return figures.strip_chart(labels, self.codes.slots, self.codes.num_codes, speed, seconds)
