"""The report's sections, in the order of the questions that they answer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lerobot_lam_diffusion.lam.fit.data import moving_pixels
from lerobot_lam_diffusion.lam.fit.report import evenly, perplexity
from lerobot_lam_diffusion.lam.resize import bilinear
from lerobot_lam_diffusion.report import figures
from lerobot_lam_diffusion.report.codes import BINS, Codes, read_codes
from lerobot_lam_diffusion.report.frames import THUMB, Entry, choose_examples, choose_pool, decode_frames
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
from lerobot_lam_diffusion.utils.errors import LamError

_STRIPS, _STRIP_FRAMES = 3, 8
_PREDICTED, _PREDICTED_SHOWN = 96, 6


@dataclass(frozen=True)
class Footage:
    """A store's dataset, and the LAM if there is one.

    Args:
        dataset: `LeRobotDataset`, bound to the store already.
        camera_key: the camera that the LAM looked at.
        lam: with the store's fingerprint, opened with its FDM if it has one; None: no predictions.
    """

    dataset: Any
    camera_key: str
    lam: Any = None


def write_report(store: TokenStore, footage: Footage | None, output: Path, seed: int = 0) -> Verdict:
    """Analyse a store and write the page.

    Args:
        store: a store of any kind and coverage.
        footage: if None, only the parts that need neither frames nor state are written.
        seed: seed for the held-out episodes and for all choices of examples.
    """
    report, sections = _look_at(store, footage, seed)
    verdict = report.verdict
    name = store.provenance.dataset.repo_id if store.provenance is not None else store.path.name
    write_page(output, name, verdict, [*sections, report.provenance_section()])
    return verdict


def card_pictures(
    store: TokenStore, footage: Footage | None, seed: int = 0
) -> tuple[Verdict, list[CardPicture]]:
    """The report's main pictures for the card of a store's repository: the first of each section."""
    report, sections = _look_at(store, footage, seed)
    pictures = []
    for section in sections:
        shown = [picture for group in section.groups for picture in group.pictures][: section.on_card]
        for number, picture in enumerate(shown, start=1):
            name = f"{PICTURE_PREFIX}{section.name}_{number}.{picture.kind.replace('jpeg', 'jpg')}"
            pictures.append(CardPicture(name, picture.data, picture.caption or picture.alt))
    return report.verdict, pictures


def _look_at(store: TokenStore, footage: Footage | None, seed: int) -> tuple["_Report", list[Section]]:
    covered = store.covered_episodes
    if footage is not None and footage.dataset.episodes is not None:
        covered = sorted(set(covered) & set(footage.dataset.episodes))
    report = _Report(store, footage, read_codes(store, covered, seed), seed)
    return report, [report.probe_section(), *report.footage_sections()]


class _Report:
    """What several sections share."""

    def __init__(self, store: TokenStore, footage: Footage | None, codes: Codes, seed: int):
        self.store, self.footage, self.codes, self.seed = store, footage, codes, seed
        self.states = None if footage is None else read_states(footage.dataset)
        self.changes: Tensor | None = None
        self.names: list[str] = []
        self.probe: StateProbe | None = None
        if footage is not None and self.states is not None:
            self.names = dimension_names(footage.dataset.meta.features[STATE_KEY], "state")
            self.changes = self.states[codes.frames] - self.states[codes.frames - store.frame_stride]
            self.probe = probe_state(store, codes, self.changes, self.names, seed)
        self.perplexity = store.code_perplexity()
        self.predicts = footage is not None and footage.lam is not None and _predicts_pictures(footage.lam)

    @property
    def verdict(self) -> Verdict:
        return judge(self.probe, self.perplexity, self.why_no_probe)

    @property
    def why_no_probe(self) -> str:
        if self.footage is None:
            return "the report was made without the dataset, whose state the tokens are compared with"
        if self.states is None:
            return "the dataset has no observation.state to compare the tokens with"
        return "the state of fewer than two episodes with tokens changes"

    def probe_section(self) -> Section:
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
        bars = Picture(
            figures.png(figures.probe_bars(probe)),
            f"Bars: R² of each state dimension from its token: {per_dimension}",
        )
        section.groups.append(Group([bars]))
        best = max(range(len(probe.names)), key=lambda axis: probe.token[axis])
        worst = min(range(len(probe.names)), key=lambda axis: probe.token[axis])
        scatters = [
            Picture(
                figures.png(figures.probe_scatter(probe, axis)),
                f"Scatter: measured change of {probe.names[axis]} against the predicted one",
                f"The {word} dimension",
            )
            for word, axis in (("best", best), ("worst", worst))
        ]
        section.groups.append(Group(scatters if best != worst else scatters[:1], look="grid"))
        return section

    def footage_sections(self) -> list[Section]:
        """The sections with frames, which are decoded once for all of them, and the usage section between."""
        if self.footage is None or not len(self.codes.frames):
            return [self.usage_section()]
        pool = choose_pool(self.codes, self.probe.held_out if self.probe is not None else [], self.seed)
        entries, occurring = choose_examples(self.codes, pool, self.seed)
        strips = {
            episode: self._strip_frames(episode)
            for episode in pool[:: max(1, len(pool) // _STRIPS)][:_STRIPS]
        }
        wanted: dict[int, set[int]] = {}
        stride = self.store.frame_stride
        for frame in [frame for entry in entries for frame in entry.examples]:
            wanted.setdefault(self._episode_of(frame), set()).update((frame - stride, frame))
        for episode, frames in strips.items():
            wanted.setdefault(episode, set()).update(frames)
        thumbs = self._decode(wanted, lambda frames: bilinear(frames, THUMB))
        sections = [
            self.atlas_section(entries, occurring, thumbs),
            self.usage_section(),
            self.strip_section(strips, thumbs),
        ]
        if self.predicts:
            sections.append(self.prediction_section(pool))
        return sections

    def atlas_section(self, entries: list[Entry], occurring: int, thumbs: dict[int, Tensor]) -> Section:
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
        shown = sum(bool(entry.examples) for entry in entries)
        if occurring > shown:
            section.texts.append(f"Shown: {shown} of the most frequent of {occurring} codes that occur.")
        pictures: dict[int, list[Picture]] = {}
        for entry in entries:
            what = "code" if codes.is_vq else "bin"
            caption = f"{what} {entry.code}: {entry.share:.1%}{self._mean_change(entry)}"
            pairs = [(thumbs[frame - stride], thumbs[frame]) for frame in entry.examples]
            if not pairs:
                continue
            slot = codes.slots[entry.slot]
            alt = f"{len(pairs)} frame pairs with {what} {entry.code} in {slot}, and their differences"
            picture = Picture(figures.jpeg(figures.pair_tiles(pairs)), alt, caption)
            pictures.setdefault(entry.slot, []).append(picture)
        section.groups = [Group(found, codes.slots[slot], "grid") for slot, found in pictures.items()]
        return section

    def usage_section(self) -> Section:
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
            for slot in range(len(codes.slots)):
                used = int((codes.shares(slot) > 0).sum())
                alike = perplexity(codes.labels[:, slot], codes.num_codes)
                section.rows.append(
                    (codes.slots[slot], f"{used} of {codes.num_codes} codes, perplexity {alike:.1f}")
                )
            bars = Picture(
                figures.png(figures.usage_bars(codes)),
                "Bars: share of the tokens that has each code, a slot above the other",
                "Share of each code; dashed: all codes used alike.",
            )
            section.groups.append(Group([bars]))
        maps = Picture(
            figures.png(figures.transition_maps(codes)),
            "Maps: which code follows which, a map for each slot",
            "What follows each code, one frame later. A bright diagonal: motion goes on as it was.",
        )
        section.groups.append(Group([maps]))
        return section

    def strip_section(self, strips: dict[int, list[int]], thumbs: dict[int, Tensor]) -> Section:
        section = Section("Where in time?", "time", on_card=2)
        section.texts.append(
            "Frames, codes (a colour each; white: no token) and the state's speed of some episodes."
        )
        for episode, frames in strips.items():
            strip = torch.cat([thumbs[frame] for frame in frames], dim=2)
            pictures = [
                Picture(
                    figures.jpeg(strip), f"{len(frames)} frames of episode {episode}, evenly over its time"
                ),
                Picture(
                    figures.png(self._strip_chart(episode)),
                    f"Chart: codes and speed of the state of episode {episode} over time",
                ),
            ]
            section.groups.append(Group(pictures, f"Episode {episode}", "strip"))
        return section

    def prediction_section(self, pool: list[int]) -> Section:
        """On the probe's held-out episodes, or without a probe drawn ones; the LAM may have seen them."""
        assert self.footage is not None
        lam, stride = self.footage.lam, self.store.frame_stride
        section = Section("What does the LAM predict?", "prediction", on_card=2)
        which, held = "drawn", pool[: max(1, len(pool) // 5)]
        if self.probe is not None:
            which, held = "held-out", self.probe.held_out
        inside = torch.isin(self.codes.episodes, torch.tensor(sorted({*held} & {*pool})))
        later = self.codes.frames[inside]
        later = evenly(later, _PREDICTED)
        if not len(later):
            section.texts.append(f"No {which} episode has a token.")
            return section
        wanted: dict[int, set[int]] = {}
        for frame in later.tolist():
            wanted.setdefault(self._episode_of(frame), set()).update((frame - stride, frame))
        found = self._decode(wanted, lambda frames: lam.resize_frames(frames).cpu())
        prev, cur = (torch.stack([found[frame] for frame in (later - gap).tolist()]) for gap in (stride, 0))
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
        shown = moving.flatten(1).sum(1).argsort(descending=True)[:_PREDICTED_SHOWN].tolist()
        pictures = [
            Picture(
                figures.jpeg(torch.cat([prev[at], predicted[at], cur[at]], dim=2)),
                f"Frame {int(later[at])} of the dataset: earlier frame, predicted frame, true frame",
                f"episode {self._episode_of(int(later[at]))}: earlier · predicted · true",
            )
            for at in shown
        ]
        section.groups.append(Group(pictures, look="grid"))
        return section

    def provenance_section(self) -> Section:
        section = Section("What is this?", "provenance", rows=[("store", self.store.name)])
        if self.store.provenance is None:
            section.rows.append(("provenance", "none: a .pt file does not say what its tokens are"))
            return section
        section.rows += [*described(self.store).items(), ("seed of this report", str(self.seed))]
        if self.footage is not None and self.footage.lam is not None and not self.predicts:
            section.rows.append(("predicted frames", "none: the LAM has no FDM here that predicts pixels"))
        return section

    def _decode(self, wanted: dict[int, set[int]], shrink: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
        assert self.footage is not None
        footage = self.footage
        return decode_frames(footage.dataset, footage.camera_key, wanted, shrink)

    def _episode_of(self, frame: int) -> int:
        return int(torch.searchsorted(self.store.episode_from, frame, right=True)) - 1

    def _mean_change(self, entry: Entry) -> str:
        if self.changes is None:
            return ""
        change = self.changes[self.codes.labels[:, entry.slot] == entry.code].mean(0)
        size = change.abs() / (self.changes.std(0) + 1e-12)
        most = size.argsort(descending=True)[:3].sort().values.tolist()
        return "; mean change " + ", ".join(f"{self.names[axis]} {float(change[axis]):+.3g}" for axis in most)

    def _strip_frames(self, episode: int) -> list[int]:
        start, stop = int(self.store.episode_from[episode]), int(self.store.episode_to[episode])
        return np.linspace(start, stop - 1, min(_STRIP_FRAMES, stop - start)).astype(int).tolist()

    def _strip_chart(self, episode: int) -> Any:
        start, stop = int(self.store.episode_from[episode]), int(self.store.episode_to[episode])
        own = self.codes.episodes == episode
        labels = torch.full((stop - start, len(self.codes.slots)), -1)
        labels[self.codes.frames[own] - start] = self.codes.labels[own]
        fps = self.footage.dataset.fps if self.footage is not None else 1
        speed = None
        if self.states is not None and self.changes is not None:
            steps = self.states[start:stop].diff(dim=0, prepend=self.states[start : start + 1])
            speed = (steps / (self.changes.std(0) + 1e-12)).norm(dim=1) * fps
        seconds = np.arange(stop - start) / fps
        return figures.strip_chart(labels, self.codes.slots, self.codes.num_codes, speed, seconds)


def _predicts_pictures(lam: Any) -> bool:
    """Whether the LAM has an FDM, opened with it, that predicts RGB frames: some predict features."""
    try:
        lam.predict_next(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, lam.token_dim))
    except LamError:
        return False
    return True
