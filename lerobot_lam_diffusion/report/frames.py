"""The few frames that the report shows: chosen first, then decoded episode by episode, each once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lerobot_lam_diffusion.report.codes import Codes

THUMB = 80
"""Edge of an example, in pixels."""
EXAMPLES = 6
_POOL = 24
_MOST_ENTRIES = 128


@dataclass(frozen=True)
class Footage:
    """A store's dataset, and the LAM if there is one.

    Args:
        dataset: `LeRobotDataset`, bound to the store already.
        camera_key: the camera that the LAM looked at.
        lam: with the store's fingerprint, opened with its FDM; None: nothing is predicted.
    """

    dataset: Any
    camera_key: str
    lam: Any = None


@dataclass(frozen=True)
class Entry:
    """A code in the atlas: its slot, number, share of the tokens, and the later frames of its examples."""

    slot: int
    code: int
    share: float
    examples: list[int]


def choose_pool(codes: Codes, held_out: Iterable[int], seed: int) -> list[int]:
    """Choose the episodes to decode: a random few, some of them held out of the probe."""
    generator = torch.Generator().manual_seed(seed)
    episodes = codes.episodes.unique()
    episodes = episodes[torch.randperm(len(episodes), generator=generator)].tolist()
    held = [episode for episode in episodes if episode in set(held_out)][: _POOL // 4]
    return sorted(list(dict.fromkeys([*held, *episodes]))[:_POOL])


def choose_examples(codes: Codes, pool: list[int], seed: int) -> tuple[list[Entry], int]:
    """The atlas, most frequent codes first in each slot, and how many codes occur in all.

    Examples come from different episodes where possible.
    """
    generator = torch.Generator().manual_seed(seed)
    in_pool = torch.isin(codes.episodes, torch.tensor(pool)).nonzero().flatten()
    in_pool = in_pool[torch.randperm(len(in_pool), generator=generator)]
    occurring = [
        (float(share), slot, code)
        for slot in range(len(codes.slots))
        for code, share in enumerate(codes.shares(slot).tolist())
        if share
    ]
    shown = sorted(occurring, reverse=True)[:_MOST_ENTRIES]
    entries = []
    for share, slot, code in sorted(shown, key=lambda each: (each[1], -each[0] if codes.is_vq else each[2])):
        rows = in_pool[codes.labels[in_pool, slot] == code]
        frames = codes.frames[rows].tolist()
        one_an_episode = dict(zip(codes.episodes[rows].tolist(), frames, strict=True)).values()
        entries.append(Entry(slot, code, share, list(dict.fromkeys([*one_an_episode, *frames]))[:EXAMPLES]))
    return entries, len(occurring)


def decode_frames(
    footage: Footage, frames: Iterable[int], shrink: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """Frames by absolute index, uint8 (3, R, R) as `shrink` makes them."""
    from lerobot_lam_diffusion.precompute.frames import EpisodeFrames  # imports LeRobot

    source, wanted = EpisodeFrames(footage.dataset, footage.camera_key), torch.tensor(sorted(set(frames)))
    starts = torch.tensor(footage.dataset.meta.episodes["dataset_from_index"])
    episodes = torch.searchsorted(starts, wanted, right=True) - 1
    found: dict[int, Tensor] = {}
    for episode in tqdm(episodes.unique().tolist(), desc="decode", unit="episode"):
        own, start = wanted[episodes == episode], int(starts[episode])
        for chunk in source.chunks(episode):
            inside = own[(own >= start) & (own < start + len(chunk))]
            if len(inside):
                found.update(zip(inside.tolist(), shrink(chunk[inside - start]), strict=True))
            start += len(chunk)
            if start > own[-1]:
                break
    return found
