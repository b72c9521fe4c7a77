"""Shards: an extraction split into groups of whole episodes, and the groups finished so far.

    STORE.shards/plan.safetensors     what is extracted and how it is cut: codebook, episodes, shards
    STORE.shards/00007.safetensors    a finished shard: `values`, VQ indices uint8/uint16 (rows, n) or
                                      continuous tokens float32 (rows, n·a)

Each file carries a manifest in its metadata, and the SHA-256 of manifest and tensors. It appears complete or
not at all, so a shard is finished once its file exists. The plan depends only on the dataset and the flags:
processes on any machine make the same one, and the first to write it decides how the episodes are split.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lerobot_lam_diffusion.tokens.episode_hashes import differing_episodes
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.storage import encode_tokens, index_dtype
from lerobot_lam_diffusion.utils.errors import ExtractionError, first_line, raise_problems
from lerobot_lam_diffusion.utils.files import whole_or_nothing

logger = logging.getLogger(__name__)

FORMAT = "lerobot_lam_diffusion.extraction 2"
PLAN_FILE = "plan.safetensors"
TABLES = ("codebook", "episode_from", "episode_to", "episode_hash", "episodes", "shard_ends")


class ShardError(ExtractionError):
    """A plan or a shard that is damaged, or of another extraction."""


@dataclass(frozen=True)
class Plan:
    """Which tokens are extracted, and in which pieces.

    Attributes:
        provenance: Provenance of the future store; hash, error and skipped episodes are not yet known.
        codebook: float32 `(K, a)`; empty for a LAM without one.
        episode_from, episode_to: int64 `(E,)`, of all the dataset's episodes.
        episode_hash: uint8 `(E, 16)`, of their frames.
        episodes: Those to extract, ascending.
        shards: For each shard, positions `(first, end)` in `episodes`.
    """

    provenance: Provenance
    codebook: Tensor
    episode_from: Tensor
    episode_to: Tensor
    episode_hash: Tensor
    episodes: list[int]
    shards: list[tuple[int, int]]

    @cached_property
    def lengths(self) -> list[int]:
        """Frames of each episode to extract."""
        return (self.episode_to - self.episode_from)[self.episodes].tolist()

    @cached_property
    def first_rows(self) -> list[int]:
        """Row of each episode's first frame among all frames to be extracted, and at the end their number."""
        return [0, *accumulate(self.lengths)]

    @property
    def row(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one row of a shard."""
        lam = self.provenance.lam
        if self.provenance.token_kind == VQ:
            return (lam.num_learned_tokens,), index_dtype(lam.num_codes)
        return (lam.num_learned_tokens * lam.action_latent_dim,), torch.float32


def cut_into_shards(lengths: Sequence[int], shard_frames: int | None = None) -> list[tuple[int, int]]:
    """Positions `(first, end)` of consecutive episodes that make a shard.

    Args:
        lengths: Frames of each episode.
        shard_frames: Minimum frames per shard (except the last); None: 1/256 of all, but 512 to 65,536.
    """
    at_least = shard_frames or min(max(sum(lengths) // 256, 512), 65536)
    ends, frames = [0], 0
    for position, length in enumerate(lengths, 1):
        frames += length
        if frames >= at_least or position == len(lengths):
            ends.append(position)
            frames = 0
    return list(pairwise(ends))


def refuse_another(
    what: str, provenance: Provenance, episodes: Sequence[int], hashes: Tensor, plan: Plan
) -> None:
    """Refuse what lies where tokens are to be extracted, unless it is of the same extraction.

    Args:
        what: What lies there, and what to do about it; begins the message.
        provenance, episodes, hashes: Its own, as `Plan` has them.
        plan: What is to be extracted.

    Raises:
        ExtractionError: lists every difference.
    """
    problems = provenance.differences(plan.provenance)
    differing = sorted(set(episodes) ^ set(plan.episodes))
    if differing:
        problems.append(
            f"it has {len(episodes)} episodes, expected {len(plan.episodes)} (--dataset.episodes differs in "
            f"{_some(differing)})"
        )
    changed = [] if problems else differing_episodes(plan.episode_hash, hashes)
    if changed:
        problems.append(f"the frames of the episodes {_some(changed)} have changed since")
    raise_problems(what, problems, ExtractionError)


@dataclass(frozen=True)
class ShardFolder:
    """The plan and the finished shards of one extraction.

    Attributes:
        path: The folder.
        plan: The plan that its shards belong to.
        digest: SHA-256 of the plan, which each shard repeats.
    """

    path: Path
    plan: Plan
    digest: str

    @classmethod
    def begin(cls, path: Path, plan: Plan) -> "ShardFolder":
        """Start an extraction in the folder `path`, or resume the one found there.

        Returns:
            The folder with the plan in effect: existing work may be split into different shards.

        Raises:
            ExtractionError: existing work is damaged, or has other inputs; every difference is listed.
        """
        path.mkdir(parents=True, exist_ok=True)
        if not (path / PLAN_FILE).exists():
            with contextlib.suppress(FileExistsError):  # another process was faster
                tables = (plan.codebook, plan.episode_from, plan.episode_to, plan.episode_hash)
                ends = torch.tensor([end for _, end in plan.shards])
                tensors = dict(zip(TABLES, (*tables, torch.tensor(plan.episodes), ends), strict=True))
                manifest = {"provenance": json.loads(plan.provenance.to_json())}
                _write(path / PLAN_FILE, manifest, tensors, replace=False)
        folder = cls.open(path)
        there = folder.plan
        refuse_another(
            f"{path} holds the unfinished work of another extraction; finish that one, choose another "
            "--output_dir, or remove the folder",
            there.provenance,
            there.episodes,
            there.episode_hash,
            plan,
        )
        # Files that were missing or damaged when the work began may be whole now.
        dataset = replace(there.provenance.dataset, frames=plan.provenance.dataset.frames)
        provenance = replace(there.provenance, dataset=dataset)
        return replace(folder, plan=replace(there, provenance=provenance, episode_hash=plan.episode_hash))

    @classmethod
    def open(cls, path: Path) -> "ShardFolder":
        """The extraction that was begun in the folder `path`.

        Raises:
            UserError: there is none, or its plan is damaged.
        """
        file = path / PLAN_FILE
        try:
            manifest, tensors, digest = _read(file)
            if "provenance" not in manifest:
                raise ShardError(f"{file} is damaged: it is a shard")
        except ShardError as error:
            raise ShardError(
                f"{error}. Remove the folder {path} and start again, or choose another --output_dir"
            ) from error
        provenance = Provenance.from_document(manifest["provenance"], str(file))
        codebook, start, stop, hashes, episodes, ends = (tensors[name] for name in TABLES)
        shards = list(pairwise([0, *ends.tolist()]))
        return cls(path, Plan(provenance, codebook, start, stop, hashes, episodes.tolist(), shards), digest)

    def write(self, shard: int, values: Tensor, skipped: dict[int, str]) -> None:
        """Finish a shard.

        Args:
            values: One row for each of its frames.
            skipped: Its episodes that could not be read → why; their rows mean nothing.

        Raises:
            UserError: continuous values that the store could not hold.
            OSError: the disk is full or not writable; the shard stays unfinished.
        """
        if values.is_floating_point():
            encode_tokens(values, self.plan.provenance.storage_dtype)
        reasons = {str(episode): reason for episode, reason in skipped.items()}
        manifest = {"plan": self.digest, "shard": shard, "skipped": reasons}
        _write(self._file(shard), manifest, {"values": values}, replace=True)

    def read(self, shard: int) -> tuple[Tensor, dict[int, str]]:
        """Rows of a finished shard, and its skipped episodes.

        Raises:
            ShardError: it is damaged, or a piece of another extraction.
        """
        path = self._file(shard)
        manifest, tensors, _ = _read(path)
        if (manifest.get("plan"), manifest.get("shard")) != (self.digest, shard):
            raise ShardError(f"{path} is of another extraction")
        return tensors["values"], {int(episode): reason for episode, reason in manifest["skipped"].items()}

    def present(self) -> list[int]:
        """Finished shards; nothing is read."""
        return [shard for shard in range(len(self.plan.shards)) if self._file(shard).is_file()]

    def progress(self) -> tuple[int, int]:
        """How many shards are finished, and how many there are."""
        return len(self.present()), len(self.plan.shards)

    def discard(self, shard: int) -> None:
        """Delete a finished shard, so that it counts as unfinished."""
        self._file(shard).unlink(missing_ok=True)

    def _file(self, shard: int) -> Path:
        return self.path / f"{shard:05d}.safetensors"


@dataclass(frozen=True)
class SkippedEpisode:
    """An episode that could not be read to its end.

    Attributes:
        position: In the plan's `episodes`.
        pairs: That were read before it failed.
        reason: Human-readable.
    """

    position: int
    pairs: int
    reason: str


@dataclass
class _Buffer:
    values: Tensor
    pending: int  # pairs that are still to come
    skipped: dict[int, str] = field(default_factory=dict)


class ShardCollector:
    """Collects encoded rows in any order, and writes each shard as soon as it is full.

    Memory: the rows of shards that have been started but are not full.

    Args:
        folder: Where finished shards are written.
        shards: The shards that this process makes.
        copied: Position of an episode in the plan → its rows, which need no encoding.
    """

    def __init__(
        self, folder: ShardFolder, shards: Sequence[int], copied: Mapping[int, Tensor] | None = None
    ) -> None:
        self._folder = folder
        self._copied = copied or {}
        self._plan = folder.plan
        self._starts = [self._plan.first_rows[first] for first, _ in self._plan.shards]
        self._buffers: dict[int, _Buffer] = {}
        for shard in shards:
            if not self._pairs_to_come(shard):
                self._count_down(shard, 0)

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Values `(B, …)` of `rows` int64 `(B,)`."""
        shard_of = torch.bucketize(rows, torch.tensor(self._starts), right=True) - 1
        for shard in shard_of.unique().tolist():
            here = shard_of == shard
            buffer = self._buffer(shard)
            buffer.values[rows[here] - self._starts[shard]] = values[here].to(buffer.values.dtype)
            self._count_down(shard, int(here.sum()))

    def skip(self, episode: SkippedEpisode) -> None:
        """Expect no more rows of an episode, and note why."""
        pairs = self._num_pairs(episode.position)
        if pairs:  # else it has no tokens, readable or not
            shard = bisect_right(self._starts, self._plan.first_rows[episode.position]) - 1
            self._buffer(shard).skipped[self._plan.episodes[episode.position]] = episode.reason
            self._count_down(shard, pairs - episode.pairs)

    def _buffer(self, shard: int) -> _Buffer:
        """Rows of frames without a token stay zero."""
        if shard not in self._buffers:
            shape, dtype = self._plan.row
            dtype = dtype if dtype.is_floating_point else torch.int32  # torch cannot index with uint16
            begin, stop = self._plan.shards[shard]
            size = self._plan.first_rows[stop] - self._starts[shard]
            values = torch.zeros((size, *shape), dtype=dtype)
            for position in range(begin, stop):
                if position in self._copied:
                    first = self._plan.first_rows[position] - self._starts[shard]
                    tokens = self._copied[position][self._plan.provenance.frame_stride :]
                    end = first + self._plan.lengths[position]
                    values[end - len(tokens) : end] = tokens.to(dtype)
            self._buffers[shard] = _Buffer(values, self._pairs_to_come(shard))
        return self._buffers[shard]

    def _count_down(self, shard: int, pairs: int) -> None:
        buffer = self._buffer(shard)
        buffer.pending -= pairs
        if buffer.pending == 0:
            self._folder.write(shard, buffer.values.to(self._plan.row[1]), buffer.skipped)
            del self._buffers[shard]

    def _pairs_to_come(self, shard: int) -> int:
        positions = range(*self._plan.shards[shard])
        return sum(self._num_pairs(position) for position in positions if position not in self._copied)

    def _num_pairs(self, position: int) -> int:
        return max(0, self._plan.lengths[position] - self._plan.provenance.frame_stride)


def _write(path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor], replace: bool) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **manifest})
    content = save(tensors, {"manifest": text, "sha256": _digest(text, tensors)})
    if path.name != PLAN_FILE and not path.parent.is_dir():  # merged by another launch meanwhile
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    with whole_or_nothing(path, replace=replace) as partial:
        partial.write_bytes(content)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Manifest and tensors of a file that is as it was written, and their SHA-256."""
    try:
        content = path.read_bytes()  # not mapped: not every file system maps files
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        digest = _digest(metadata["manifest"], tensors)
        if digest != metadata["sha256"]:
            raise ValueError(f"its SHA-256 is {digest[:16]}…, it says {metadata['sha256'][:16]}…")
        manifest = json.loads(metadata["manifest"])
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, expected {FORMAT!r}")
    except (SafetensorError, FileNotFoundError, IsADirectoryError, ValueError, KeyError) as error:
        raise ShardError(f"{path} is damaged: {first_line(error)}") from error
    return manifest, tensors, digest


def _digest(manifest: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _some(episodes: Sequence[int]) -> str:
    return ", ".join(map(str, episodes[:5])) + (", …" if len(episodes) > 5 else "")


def nothing_readable(skipped: Mapping[int, str]) -> ExtractionError:
    """The error for an extraction that skipped every episode that has tokens."""
    first = min(skipped)
    return ExtractionError(
        f"no token was extracted, all {len(skipped)} episodes with tokens were skipped (episode {first}: "
        f"{skipped[first]}). There is no store; repair the files and run the same command again"
    )
