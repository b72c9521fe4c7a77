"""The token store: one file of tensors, memory-mapped, and the join of its rows to frames.

A store is a folder with two files, never a pickle:

    lam_tokens.safetensors   VQ: `indices` uint8/uint16 (N, n), `codebook` float32 (K, a)
                             continuous: `tokens` float32 (N, n·a)
                             both: `episode_from`, `episode_to`, `episode_row` int64 (E,)
    lam_tokens.json          provenance (see `provenance.py`)

The E rows of the three tables are the dataset's episodes in order: episode e holds the absolute frames
`episode_from[e] .. episode_to[e] - 1`, and its tokens begin at row `episode_row[e]`, or it is not in this
store where that is -1.
"""

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.tokens.layout import TokenStoreError, check_content, find_folder, map_store
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance

logger = logging.getLogger(__name__)


@dataclass
class TokenStore:
    """Tokens of a dataset's frames, addressed by absolute frame index.

    Open one with `TokenStore.open`. It pickles as its path: a data-loading worker maps the file again.

    Attributes:
        path: Folder of the store (or the user's `.pt` file).
        provenance: What the tokens are; None for a `.pt` file, which says nothing reliable about itself.
        kind: "vq" or "continuous".
        frame_stride: Gap of a frame pair; a frame less than that after its episode's start has no token.
        token_dim: n * a, numbers in one token.
        values: VQ: `(N, n)` code indices. Continuous: `(N, n·a)` float32.
        codebook: VQ: `(K, a)` float32, else None.
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

    @classmethod
    def open(cls, path: str | Path, dataset_meta: Any = None) -> "TokenStore":
        """Open a store and check that it is whole.

        The hash of the tensors and the scan for NaN run once per path, size and modification time.

        Args:
            path: Folder of a store, its `.safetensors` file, or a user's `.pt` file.
            dataset_meta: `LeRobotDatasetMetadata` of the dataset to use it with. If given, the store must
                have been made of that very dataset. A `.pt` file needs it, to learn the episodes.

        Raises:
            TokenStoreError: missing, damaged, newer than this package, or of another dataset.
        """
        path = Path(path).expanduser()
        if path.suffix in (".pt", ".pth") and not path.is_dir():
            from lerobot_lam_diffusion.tokens.pt import open_pt

            return open_pt(path, dataset_meta)
        folder = find_folder(path)
        check_content(folder)
        store = cls._map(folder)
        if dataset_meta is not None:
            from lerobot_lam_diffusion.tokens.binding import check_binding

            check_binding(store, dataset_meta)
        if store.missing_episodes:
            logger.warning("Token store %s is partial: %s.", folder, store.coverage)
        return store

    @classmethod
    def _map(cls, folder: Path) -> "TokenStore":
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
        )

    def __reduce__(self) -> tuple:
        if self.provenance is None:  # a `.pt` file: nothing to map, its tensors travel
            return (TokenStore, tuple(vars(self).values()))
        return (TokenStore._map, (self.path,))

    @property
    def num_frames(self) -> int:
        """Frames of the dataset, whether or not this store covers them."""
        return int(self.episode_to[-1])

    @property
    def missing_episodes(self) -> list[int]:
        """Episodes of the dataset that this store does not cover."""
        return torch.nonzero(self.episode_row < 0).flatten().tolist()

    @property
    def coverage(self) -> str:
        """For people: which episodes this store covers."""
        total = len(self.episode_row)
        covered = torch.nonzero(self.episode_row >= 0).flatten().tolist()
        if len(covered) == total:
            return f"it covers all {total} episodes"
        return f"it covers {len(covered)} of {total} episodes ({_ranges(covered)})"

    def window(self, index: Tensor, deltas: Sequence[int]) -> Tensor:
        """Tokens of the frames `index + deltas`: the one join.

        Frames outside the episode are clamped to its first or last one, exactly as LeRobot clamps
        observations (`DatasetReader._get_query_indices`); a frame without a token gives zeros.

        Args:
            index: Absolute frame indices, int64 `(B,)`, as in a batch's `index`.
            deltas: Frame offsets, e.g. `[-1, 0]`.

        Returns:
            float32 `(B, T, token_dim)` on the device of `index`.

        Raises:
            TokenStoreError: a frame lies in an episode that this store does not cover, or outside the
                dataset.
        """
        device = index.device
        index = index.reshape(-1).cpu()
        episode = torch.searchsorted(self.episode_from, index, right=True) - 1
        self._refuse_uncovered(index, episode)
        first = self.episode_from[episode].unsqueeze(1)
        last = self.episode_to[episode].unsqueeze(1) - 1
        offsets = torch.tensor([operator.index(delta) for delta in deltas], dtype=torch.int64)
        frame = (index.unsqueeze(1) + offsets).clamp(first, last)  # (B, T)
        tokens = self._decode(self.values[self.episode_row[episode].unsqueeze(1) + frame - first])
        tokens = tokens.masked_fill((frame - first < self.frame_stride).unsqueeze(-1), 0.0)
        return tokens.to(device)

    def code_perplexity(self) -> list[float]:
        """Per slot, how many codes are in use: the perplexity of their shares, without missing tokens.

        Empty for continuous tokens.
        """
        if self.codebook is None:
            return []
        perplexity = []
        frame = self.frames_with_tokens()
        episode = torch.searchsorted(self.episode_from, frame, right=True) - 1
        rows = self.episode_row[episode] + frame - self.episode_from[episode]
        for codes in self.values[rows].T:
            shares = torch.bincount(codes.long(), minlength=len(self.codebook)) / max(len(codes), 1)
            perplexity.append(float(torch.exp(-torch.xlogy(shares, shares).sum())))
        return perplexity

    def frames_with_tokens(self) -> Tensor:
        """Absolute indices of the frames that have a token, ascending, int64."""
        frame = torch.arange(self.num_frames)
        episode = torch.searchsorted(self.episode_from, frame, right=True) - 1
        has_pair = frame - self.episode_from[episode] >= self.frame_stride
        return frame[has_pair & (self.episode_row[episode] >= 0)]

    def _decode(self, values: Tensor) -> Tensor:
        """Rows of the store `(B, T, ·)` as tokens `(B, T, token_dim)`."""
        if self.codebook is None:
            return values
        return self.codebook[values.long()].flatten(-2)

    def _refuse_uncovered(self, index: Tensor, episode: Tensor) -> None:
        outside = (index < 0) | (index >= self.num_frames)
        uncovered = outside | (self.episode_row[episode] < 0)
        if not uncovered.any():
            return
        at = int(uncovered.nonzero()[0, 0])
        frame = int(index[at])
        if outside[at]:
            raise TokenStoreError(
                f"{self.path} has no frame {frame}: its dataset has {self.num_frames} frames. Was it made of "
                "this dataset?"
            )
        raise TokenStoreError(
            f"{self.path} lacks episode {int(episode[at])}, which frame {frame} belongs to; {self.coverage}. "
            "Extract the missing episodes with lerobot-lam-precompute, or train on the covered ones with "
            "--dataset.episodes"
        )


def _ranges(numbers: list[int], at_most: int = 8) -> str:
    """`[0, 1, 2, 5]` as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(texts[:at_most]) + (", …" if len(texts) > at_most else "") if texts else "none"
