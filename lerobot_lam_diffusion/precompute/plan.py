"""Plan: what an extraction will make, and the shards of whole episodes that it is cut into.

The plan lies beside the shards (`STORE.shards/plan.json`). It follows from the dataset and the flags alone,
so that processes on any machine make the same one, and a second run tells by it whether it goes on with the
first one's work.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeGuard

from lerobot_lam_diffusion.precompute.files import write_durably
from lerobot_lam_diffusion.problems import UserError, raise_problems
from lerobot_lam_diffusion.tokens.provenance import Provenance
from lerobot_lam_diffusion.utils.files import partial_name

FORMAT = "lerobot_lam_diffusion.extraction_plan"
FORMAT_VERSION = 1
PLAN_FILE = "plan.json"
LARGEST_PLAN = 256 << 20  # bytes: some ten million episodes

NOT_IDENTITY = {
    "versions", "tensors_sha256", "max_error", "skipped",
    "dataset.repo_id", "dataset.revision", "dataset.frames", "lam.path", "lam.revision",
}  # fmt: skip
"""Fields of a store's provenance that may differ between runs that give the same tokens. Frames are compared
by episode: one that could not be read may have been repaired since."""

FOLLOWS = {"stride_seconds"}
"""Fields that differ only where others do."""


class PlanError(UserError):
    """Unfinished work that is damaged, or that this run cannot go on with."""

    section = "extraction"


@dataclass(frozen=True)
class Plan:
    """Which tokens, and in which pieces.

    Attributes:
        identity: What decides a token's value: flat names → values.
        episodes: Episodes to extract, ascending.
        lengths: Their frames.
        shards: For each shard, positions `(first, end)` in `episodes`.
        origin: What merging needs besides; see `merge.Extraction`.
    """

    identity: dict[str, Any]
    episodes: list[int]
    lengths: list[int]
    shards: list[tuple[int, int]]
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        identity: dict[str, Any],
        episodes: Sequence[int],
        lengths: Sequence[int],
        shard_frames: int | None,
    ) -> "Plan":
        """Cut episodes into shards of at least `shard_frames` frames (None: 1/256 of all, 512 to 65,536)."""
        at_least = shard_frames or min(max(sum(lengths) // 256, 512), 65536)
        shards, first, frames = [], 0, 0
        for position, length in enumerate(lengths):
            frames += length
            if frames >= at_least:
                shards.append((first, position + 1))
                first, frames = position + 1, 0
        if first < len(lengths):
            shards.append((first, len(lengths)))
        return cls(identity, list(episodes), list(lengths), shards)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan: a shard says to which one it belongs."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    @property
    def first_rows(self) -> list[int]:
        """Row of each episode's first frame among all frames to be extracted, and at the end their number."""
        return [0, *accumulate(self.lengths)]

    def shard_sizes(self) -> list[int]:
        """Frames of each shard."""
        rows = self.first_rows
        return [rows[end] - rows[first] for first, end in self.shards]

    def settle(self, folder: Path) -> "Plan":
        """Leave this plan in `folder`, or go on with the one that lies there.

        Returns:
            The plan in force: what is there may be cut into other shards.

        Raises:
            PlanError: it is damaged, or of other inputs; every difference is listed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / PLAN_FILE
        if not path.exists():
            partial = write_durably(partial_name(path), self._to_json().encode())
            try:
                os.link(partial, path)  # unlike a rename it fails if another process was faster
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(partial, path)
            partial.unlink(missing_ok=True)
        there = Plan.read(path)
        problems = differences(self.identity, there.identity)
        problems += episodes_differ(self.episodes, there.episodes)
        raise_problems(
            f"{folder} holds the unfinished work of another extraction; finish that one, choose another "
            "--output_dir, or remove the folder",
            problems,
            PlanError,
        )
        return there

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read and check a plan file.

        Raises:
            PlanError: it is not a plan, newer than this package, or inconsistent.
        """
        try:
            if path.stat().st_size > LARGEST_PLAN:
                raise ValueError("it is too large for a plan")
            document = json.loads(path.read_text(encoding="utf-8"))
            problem = _problem(document)
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(path, str(error)) from error
        if problem:
            raise _damaged(path, problem)
        shards = [(first, end) for first, end in document["shards"]]
        return cls(
            document["identity"], document["episodes"], document["lengths"], shards, document["origin"]
        )

    def _to_json(self) -> str:
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)})


def identity_of(provenance: Provenance) -> dict[str, Any]:
    """What decides the stored values, flat: `{"lam.fingerprint": …, "camera_key": …, …}`."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(provenance).items():
        parts = (
            {f"{name}.{key}": part for key, part in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
        flat |= {key: part for key, part in parts.items() if not {key, name} & NOT_IDENTITY}
    return flat


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Every name on which this run and what lies there disagree, for people."""
    return [
        f"its {name} is {there.get(name)!r}, this run's {here.get(name)!r}"
        for name in sorted((here.keys() | there.keys()) - FOLLOWS)
        if here.get(name) != there.get(name)
    ]


def episodes_differ(here: Sequence[int], there: Sequence[int]) -> list[str]:
    """The same for the episodes to extract: empty, or one sentence."""
    apart = sorted(set(here) ^ set(there))
    if not apart:
        return []
    some = ", ".join(map(str, apart[:5])) + (", …" if len(apart) > 5 else "")
    return [f"it extracts {len(there)} episodes, this run {len(here)} (--dataset.episodes differs in {some})"]


def share_of(sizes: Sequence[int], which: Sequence[int], index: int, count: int) -> list[int]:
    """Shards of process `index` of `count`: largest first, each to the process with the least frames so far.

    Args:
        sizes: Frames of every shard.
        which: Shards to hand out.

    Returns:
        This process's, ascending.
    """
    loads = [0] * count
    mine = []
    for shard in sorted(which, key=lambda shard: (-sizes[shard], shard)):
        process = loads.index(min(loads))
        loads[process] += sizes[shard]
        if process == index:
            mine.append(shard)
    return sorted(mine)


def _problem(document: Any) -> str | None:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return f'expected "format": "{FORMAT}"'
    if document.get("format_version") != FORMAT_VERSION:
        return f"format_version is {document.get('format_version')!r}, this package reads {FORMAT_VERSION}"
    if not isinstance(document.get("identity"), dict) or not isinstance(document.get("origin"), dict):
        return "identity or origin is not an object"
    episodes, lengths = document.get("episodes"), document.get("lengths")
    if not _are_counts(episodes) or not _are_counts(lengths) or not 0 < len(episodes) == len(lengths):
        return "episodes and lengths are not two equally long lists of numbers"
    if episodes != sorted(set(episodes)) or min(lengths) < 1:
        return "episodes do not ascend, or have no frames"
    shards = document.get("shards")
    if not isinstance(shards, list) or not all(_are_counts(shard) and len(shard) == 2 for shard in shards):
        return "shards are not pairs of numbers"
    ends = [0, *(end for _, end in shards)]
    if [first for first, _ in shards] != ends[:-1] or ends != sorted(set(ends)) or ends[-1] != len(episodes):
        return "shards do not cut the episodes into consecutive pieces"
    return None


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _damaged(path: Path, what: str) -> PlanError:
    return PlanError(
        f"{path} is damaged ({what}): expected the plan of an extraction. Remove the folder {path.parent} "
        "and start again, or choose another --output_dir"
    )
