"""The token store: one file of tensors, memory-mapped, and the join of its rows to frames.

A store is a folder with two files, never a pickle:

    lam_tokens.safetensors   VQ: `indices` uint8/uint16 (N, n), `codebook` float32 (K, a)
                             continuous: `tokens` (N, n·a), as float32 or smaller (see `storage.py`)
                             both: `episode_from`, `episode_to`, `episode_row` int64 (E,),
                             `episode_hash` uint8 (E, 16), since format version 3
    lam_tokens.json          provenance (see `provenance.py`)

The E rows of the three tables are the dataset's episodes in order: episode e holds the absolute frames
`episode_from[e] .. episode_to[e] - 1`, and its tokens begin at row `episode_row[e]`. If that is -1, the
episode is not in this store.
"""

import contextlib
import hashlib
import logging
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.binding import check_binding
from lerobot_lam_diffusion.tokens.dataset_check import episode_bounds
from lerobot_lam_diffusion.tokens.layout import (
    EPISODE_HASH,
    TENSORS_FILE,
    check_content,
    find_folder,
    map_store,
    unknown_hashes,
)
from lerobot_lam_diffusion.tokens.locating import check_located, locate_store
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.pt import read_pt
from lerobot_lam_diffusion.tokens.storage import decode_tokens
from lerobot_lam_diffusion.utils.errors import TokenStoreError

logger = logging.getLogger(__name__)

BLOCK_ROWS = 1 << 14
"""Rows at a time when scanning a whole store: 4 MB of tokens of 64 numbers."""

READAHEAD_BYTES = 8 << 30
"""The largest store that is read into the page cache when a training opens it."""


@dataclass
class TokenStore:
    """Tokens of a dataset's frames, addressed by absolute frame index.

    Open one with `TokenStore.open`. It pickles as its path: a data-loading worker maps the file again.

    Attributes:
        path: Folder of the store (or the user's `.pt` file).
        provenance: What the tokens are; None for a `.pt` file, which says nothing reliable about itself.
        kind: "vq" or "continuous".
        frame_stride: Offset of a frame pair; the first `frame_stride` frames of an episode have no token.
        token_dim: n * a, numbers in one token.
        values: Rows as stored. VQ: `(N, n)` code indices. Continuous: `(N, n·a)`; `decode` gives the tokens.
        codebook: VQ: `(K, a)` float32, else None.
        episode_hash: uint8 `(E, 16)`, of each episode's frames (see `episode_hashes.py`); zeros: not known.
        row_scale: int8 storage: `(N,)` float32, else None.
        hub_id: `user/name@commit` of a store that came from the Hub, else None.
    """

    path: Path
    provenance: Provenance | None
    kind: str
    frame_stride: int
    token_dim: int
    values: Tensor
    codebook: Tensor | None
    episode_from: Tensor
    episode_to: Tensor
    episode_row: Tensor
    episode_hash: Tensor
    row_scale: Tensor | None = None
    hub_id: str | None = None

    @classmethod
    def open(cls, path: str | Path, dataset_meta: Any = None) -> "TokenStore":
        """Open a store and check that it is whole.

        The hash of the tensors and the scan for NaN run once per path, size and modification time, on this
        machine; opening it again costs milliseconds, whatever its size.

        Args:
            path: Folder of a store, its `.safetensors` file, or a user's `.pt` file; or a Hub repository,
                `user/name[@revision]` (see `locating.py`), which is fetched into the Hub's cache.
            dataset_meta: `LeRobotDatasetMetadata` of the dataset to use it with. If given, the store must
                have been made of that very dataset. A `.pt` file needs it, to learn the episodes.

        Raises:
            TokenStoreError: missing, damaged, newer than this package, or of another dataset; the Hub
                refused it or cannot be reached.
        """
        path, hub_id = locate_store(path)
        if path.suffix in (".pt", ".pth") and not os.path.isdir(path):
            return cls._of_pt(path, dataset_meta)
        store = cls._map(check_located(path, hub_id), hub_id)
        if dataset_meta is not None:
            check_binding(store, dataset_meta)
            _read_ahead(store.path / TENSORS_FILE)
        if bool((store.episode_row < 0).any()):
            logger.warning("Token store %s is partial: %s.", store.name, store.coverage)
        return store

    @classmethod
    def load(cls, folder: Path) -> "TokenStore":
        """Open the store in this very folder: no search, no dataset, no warning of a partial one.

        Raises:
            TokenStoreError: missing, damaged, or newer than this package.
        """
        check_content(find_folder(folder))
        return cls._map(folder)

    @classmethod
    def in_memory(
        cls,
        path: Path,
        dataset_meta: Any,
        values: Tensor,
        kind: str,
        frame_stride: int,
        provenance: Provenance | None = None,
    ) -> "TokenStore":
        """Tokens float32 `(N, n·a)`, a row for each frame of a dataset, as a store."""
        start, stop = episode_bounds(dataset_meta)
        return cls(
            path=path,
            provenance=provenance,
            kind=kind,
            frame_stride=frame_stride,
            token_dim=values.shape[1],
            values=values,
            codebook=None,
            episode_from=start,
            episode_to=stop,
            episode_row=start,
            episode_hash=unknown_hashes(len(start)),
        )

    @classmethod
    def _of_pt(cls, path: Path, dataset_meta: Any) -> "TokenStore":
        """Open a user's `.pt` file; an episode's first `frame_stride` rows always count as missing."""
        store = cls.in_memory(path, dataset_meta, *read_pt(path, dataset_meta))
        if filled := int(store.values[store.missing_rows()].any(1).sum()):
            logger.warning(
                "%s: %d frames at episode starts have no frame %d before them, but hold non-zero tokens; "
                "they count as missing (zero).",
                path,
                filled,
                store.frame_stride,
            )
        return store

    @classmethod
    def _map(cls, folder: Path, hub_id: str | None = None) -> "TokenStore":
        provenance, tensors = map_store(folder)
        lam = provenance.lam
        return cls(
            path=folder,
            provenance=provenance,
            kind=provenance.token_kind,
            frame_stride=provenance.frame_stride,
            token_dim=lam.num_learned_tokens * lam.action_latent_dim,
            values=tensors["indices" if provenance.token_kind == VQ else "tokens"],
            codebook=tensors.get("codebook"),
            episode_from=tensors["episode_from"],
            episode_to=tensors["episode_to"],
            episode_row=tensors["episode_row"],
            episode_hash=tensors.get(EPISODE_HASH, unknown_hashes(len(tensors["episode_row"]))),
            row_scale=tensors.get("row_scale"),
            hub_id=hub_id,
        )

    @classmethod
    def _map_again(cls, folder: Path, hub_id: str | None, identity: str) -> "TokenStore":
        """In another process: the same store, or an error if another one has taken its place."""
        store = cls._map(folder, hub_id)
        if store._identity() != identity:
            raise TokenStoreError(
                f"{store.name} was replaced while it was in use; start what uses it again with the new one"
            )
        return store

    def __reduce__(self) -> tuple:
        if self.provenance is None:  # a `.pt` file: nothing to map, its tensors travel
            return (TokenStore, tuple(vars(self).values()))
        return (TokenStore._map_again, (self.path.absolute(), self.hub_id, self._identity()))

    def _identity(self) -> str:
        assert self.provenance is not None
        return hashlib.sha256(self.provenance.to_json().encode()).hexdigest()

    @property
    def name(self) -> str:
        """What to call it: `user/name@commit` if it came from the Hub, else its path."""
        return self.hub_id or str(self.path)

    @property
    def num_frames(self) -> int:
        """Frames of the dataset, whether or not this store covers them."""
        return int(self.episode_to[-1])

    @property
    def covered_episodes(self) -> list[int]:
        """Episodes of the dataset that this store covers."""
        return torch.nonzero(self.episode_row >= 0).flatten().tolist()

    @property
    def missing_episodes(self) -> list[int]:
        """Episodes of the dataset that this store does not cover."""
        return torch.nonzero(self.episode_row < 0).flatten().tolist()

    @property
    def skipped(self) -> dict[int, str]:
        """Episodes that extraction could not read, and why."""
        skipped = self.provenance.skipped if self.provenance is not None else {}
        return {int(episode): reason for episode, reason in skipped.items()}

    @property
    def num_tokens(self) -> int:
        """Frames that this store covers and that have a token."""
        return int(self._counts(self.frame_stride).sum())

    @property
    def coverage(self) -> str:
        """Human-readable: which episodes this store covers, and which could not be read."""
        total = len(self.episode_row)
        covered = self.covered_episodes
        if len(covered) == total:
            return f"it covers all {total} episodes"
        listed = ", ".join(map(str, covered[:8])) + (", …" if len(covered) > 8 else "")
        covers = f"it covers {len(covered)} of {total} episodes ({listed or 'none'})"
        skipped = [f"episode {episode} ({reason})" for episode, reason in sorted(self.skipped.items())]
        if skipped:
            more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
            covers += f"; extraction skipped {', '.join(skipped[:3])}{more}"
        return covers

    def window(self, index: Tensor, deltas: Sequence[int], *, ahead: bool = False) -> Tensor:
        """Tokens of the frames `index + deltas`; the only place where tokens are joined to frames.

        Frames outside the episode are clamped to its first or last one, exactly as LeRobot clamps
        observations (`DatasetReader._get_query_indices`); a frame without a token gives zeros.

        Args:
            index: Absolute frame indices, int64 `(B,)`, as in a batch's `index`.
            deltas: Frame offsets, e.g. `[-1, 0]`.
            ahead: Give zeros for frames past the episode's end, instead of the last frame's token.

        Returns:
            float32 `(B, T, token_dim)` on the device of `index`.

        Raises:
            TokenStoreError: a frame lies in an episode that this store does not cover, or outside the
                dataset.
        """
        device = index.device
        index = index.reshape(-1).cpu().contiguous()
        episode = torch.searchsorted(self.episode_from, index, right=True) - 1
        self._refuse_uncovered(index, episode)
        first = self.episode_from[episode].unsqueeze(1)
        last = self.episode_to[episode].unsqueeze(1) - 1
        offsets = torch.tensor([operator.index(delta) for delta in deltas], dtype=torch.int64)
        wanted = index.unsqueeze(1) + offsets  # (B, T)
        frame = wanted.clamp(first, last)
        rows = self.episode_row[episode].unsqueeze(1) + frame - first
        tokens = self.decode(rows)
        missing = frame - first < self.frame_stride
        if ahead:
            missing |= wanted > last
        tokens = tokens.masked_fill(missing.unsqueeze(-1), 0.0)
        return tokens.to(device)

    def code_perplexity(self) -> list[float]:
        """Per slot, how many codes are in use: the perplexity of their shares, without missing tokens.

        Empty for continuous tokens.
        """
        counts = self.code_counts()
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return torch.exp(-torch.xlogy(shares, shares).sum(1)).tolist()

    def code_counts(self) -> Tensor:
        """How often each code occurs in each slot, int64 `(n, K)`, without missing tokens.

        `(0, 0)` for continuous tokens.
        """
        if self.codebook is None:
            return torch.zeros(0, 0, dtype=torch.int64)
        slots = self.values.shape[1]
        counts = torch.zeros(slots, len(self.codebook), dtype=torch.int64)
        for start in range(0, len(self.values), BLOCK_ROWS):
            block = self.values[start : start + BLOCK_ROWS]
            frame, episode = self.frames_at(torch.arange(start, start + len(block)))
            present = block[frame - self.episode_from[episode] >= self.frame_stride].long()
            for slot in range(slots):
                counts[slot] += torch.bincount(present[:, slot], minlength=len(self.codebook))
        return counts

    def frames_with_tokens(self) -> Tensor:
        """Absolute indices of the frames that have a token, ascending, int64."""
        return self.frames_at(torch.arange(self.num_tokens), skip=self.frame_stride)[0]

    def missing_rows(self) -> Tensor:
        """Which rows of a store of all episodes are those of frames without a token, bool `(N,)`."""
        missing = torch.ones(len(self.values), dtype=torch.bool)
        missing[self.frames_with_tokens()] = False
        return missing

    def frames_at(self, position: Tensor, skip: int = 0) -> tuple[Tensor, Tensor]:
        """Which frames are at the given positions among all frames that this store covers.

        Args:
            position: Int64 `(B,)`; without `skip`, these are rows of the store.
            skip: Number of frames to leave out at the start of each episode. With `skip=frame_stride` and
                positions below `num_tokens`, the remaining frames are those that have a token.

        Returns:
            Absolute frame indices and episodes, int64 `(B,)` each.
        """
        counts = self._counts(skip)
        ends = torch.cumsum(counts, 0)
        episode = torch.searchsorted(ends, position, right=True)
        return self.episode_from[episode] + skip + position - (ends - counts)[episode], episode

    def decode(self, rows: Tensor) -> Tensor:
        """Tokens of rows of the store (int64 of any shape), float32 `(..., token_dim)`.

        Rows at an episode's start are decoded too: `window` determines which of them are missing.
        """
        values = self.values[rows]
        if self.codebook is not None:
            return self.codebook[values.long()].flatten(-2)
        return decode_tokens(values, None if self.row_scale is None else self.row_scale[rows])

    def _counts(self, skip: int) -> Tensor:
        """Covered frames of each episode `(E,)`, without its first `skip`."""
        return (self.episode_to - self.episode_from - skip).clamp(min=0) * (self.episode_row >= 0)

    def _refuse_uncovered(self, index: Tensor, episode: Tensor) -> None:
        outside = (index < 0) | (index >= self.num_frames)
        uncovered = outside | (self.episode_row[episode] < 0)
        if not uncovered.any():
            return
        at = int(uncovered.nonzero()[0, 0])
        frame = int(index[at])
        if outside[at]:
            raise TokenStoreError(
                f"{self.name} has no frame {frame}: its dataset has {self.num_frames} frames. Was it made of "
                "this dataset?"
            )
        number = int(episode[at])
        reason = f" (extraction skipped it: {self.skipped[number]})" if number in self.skipped else ""
        raise TokenStoreError(
            f"{self.name} lacks episode {number}, which frame {frame} belongs to{reason}; {self.coverage}. "
            "Extract the missing episodes with lerobot-lam-precompute, or train on the covered ones with "
            "--dataset.episodes"
        )


def _read_ahead(path: Path) -> None:
    """Ask the kernel to read a file before its rows are wanted in random order, one after another."""
    if hasattr(os, "posix_fadvise") and path.stat().st_size <= READAHEAD_BYTES:
        with path.open("rb") as file, contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
