"""Shards: finished pieces of an extraction, each two files in `STORE.shards/`.

    00007.safetensors   `values`: VQ code indices uint8/uint16 (rows, n), or float32 (rows, n·a)
    00007.json          the manifest: which plan, how many rows, the SHA-256 of the tensors, skipped episodes

The manifest is written last and atomically: a shard with a manifest is finished, anything else is not there.
File names follow from the shard's number and from nothing that is read.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lerobot_lam_diffusion.precompute.files import write_atomically
from lerobot_lam_diffusion.precompute.plan import Plan
from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.tokens.layout import sha256_of

logger = logging.getLogger(__name__)

FORMAT = "lerobot_lam_diffusion.token_shard"
LARGEST_MANIFEST = 64 << 20  # bytes


class ShardError(UserError):
    """A shard that is not what its manifest says."""

    section = "extraction"


@dataclass(frozen=True)
class ShardFolder:
    """The finished shards of one plan.

    Attributes:
        path: The folder; `plan`: what its shards are pieces of.
        values_shape: Shape of one row, `(n,)` or `(n·a,)`; `values_dtype`: of the rows.
    """

    path: Path
    plan: Plan
    values_shape: tuple[int, ...]
    values_dtype: torch.dtype

    def write(self, shard: int, values: Tensor, skipped: dict[int, str]) -> None:
        """Finish a shard.

        Args:
            values: One row for each of its frames.
            skipped: Its episodes that could not be read → why; their rows mean nothing.

        Raises:
            OSError: the disk is full or not writable; the shard stays unfinished.
        """
        tensors = save({"values": values.contiguous()})
        write_atomically(self._tensors(shard), tensors)
        manifest = {
            "format": FORMAT,
            "plan": self.plan.digest,
            "shard": shard,
            "rows": len(values),
            "sha256": hashlib.sha256(tensors).hexdigest(),
            "skipped": {str(episode): reason for episode, reason in skipped.items()},
        }
        write_atomically(self._manifest(shard), json.dumps(manifest, indent=1).encode())

    def finished(self, shards: Sequence[int] | None = None) -> list[int]:
        """Which of `shards` (all of the plan's) are finished, every byte read; damaged ones are told."""
        found = []
        for shard in range(len(self.plan.shards)) if shards is None else shards:
            if not self._manifest(shard).is_file():
                continue
            try:
                self.check(shard)
                found.append(shard)
            except ShardError as error:
                logger.warning("%s; it is extracted again.", error)
        return found

    def present(self) -> list[int]:
        """Shards that have a manifest; nothing is read."""
        return [shard for shard in range(len(self.plan.shards)) if self._manifest(shard).is_file()]

    def discard(self, shard: int) -> None:
        """Make a finished shard an unfinished one."""
        self._manifest(shard).unlink(missing_ok=True)

    def check(self, shard: int) -> dict[int, str]:
        """Read a finished shard from end to end; its skipped episodes.

        Raises:
            ShardError: it is damaged, or a piece of another plan.
        """
        manifest = self._read_manifest(shard)
        try:
            digest = sha256_of(self._tensors(shard))
        except OSError as error:
            raise ShardError(f"{self._tensors(shard)} cannot be read ({error.strerror})") from error
        if digest != manifest["sha256"]:
            raise ShardError(
                f"{self._tensors(shard)} is damaged: its SHA-256 is {digest[:16]}…, its manifest says "
                f"{manifest['sha256'][:16]}…"
            )
        self.values(shard)
        return {int(episode): reason for episode, reason in manifest["skipped"].items()}

    def values(self, shard: int) -> Tensor:
        """Rows of a finished shard.

        Raises:
            ShardError: it is damaged.
        """
        path = self._tensors(shard)
        try:
            values = load(path.read_bytes())["values"]  # read: not every file system maps files
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ShardError(f"{path} is damaged: {error}") from error
        expected = (self.plan.shard_sizes()[shard], *self.values_shape)
        if tuple(values.shape) != expected or values.dtype != self.values_dtype:
            raise ShardError(
                f"{path} holds {tuple(values.shape)} {values.dtype}, expected {expected} {self.values_dtype}"
            )
        return values

    def _read_manifest(self, shard: int) -> dict[str, Any]:
        path = self._manifest(shard)
        try:
            if path.stat().st_size > LARGEST_MANIFEST:
                raise ValueError("it is too large for a manifest")
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ShardError(f"{path} is damaged ({error})") from error
        first, end = self.plan.shards[shard]
        episodes = {str(episode) for episode in self.plan.episodes[first:end]}
        expected = {
            "format": FORMAT,
            "plan": self.plan.digest,
            "shard": shard,
            "rows": self.plan.shard_sizes()[shard],
        }
        if not isinstance(manifest, dict) or any(manifest.get(key) != want for key, want in expected.items()):
            raise ShardError(f"{path} is damaged, or of another extraction")
        skipped = manifest.get("skipped")
        if (
            not isinstance(manifest.get("sha256"), str)
            or not isinstance(skipped, dict)
            or not all(key in episodes and isinstance(reason, str) for key, reason in skipped.items())
        ):
            raise ShardError(f"{path} is damaged: its sha256 or skipped is not as written")
        return manifest

    def _tensors(self, shard: int) -> Path:
        return self.path / f"{shard:05d}.safetensors"

    def _manifest(self, shard: int) -> Path:
        return self.path / f"{shard:05d}.json"
