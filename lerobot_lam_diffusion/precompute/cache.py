"""Token stores under LeRobot's home, named after what determines their tokens, and built on first use.

    stores/<name>/             a finished store
    stores/<name>.shards/      its extraction, running or interrupted
    stores/.locks/<name>.lock  held while the store is built, opened or removed

Experiments share a store because its name follows from its content. A process that needs a store being built
elsewhere waits on its lock. The kernel releases the lock of a process that dies, and the next one continues
with the finished shards.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout
from lerobot.utils.constants import HF_LEROBOT_HOME

from lerobot_lam_diffusion.precompute.shards import ShardFolder
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, unfinished_folder
from lerobot_lam_diffusion.tokens.pairs import is_pair_cache
from lerobot_lam_diffusion.tokens.provenance import Provenance
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import ExtractionError, TokenStoreError
from lerobot_lam_diffusion.utils.files import locked, remove_partial, remove_whole

LOCKS = ".locks"
NAME_FORMAT = 2  # to be raised where the same identity would stand for other tokens


def cache_name(provenance: Provenance) -> str:
    """Name of a cached store of all these tokens: readable prefix, unique suffix.

    Frames are identified by their own digest where it is known, rather than by their statistics.
    """
    dataset = provenance.dataset
    frames = {"dataset.digest": dataset.frames or dataset.digest, "dataset.fps": float(dataset.fps)}
    identity = json.dumps({"format": NAME_FORMAT, **provenance.identity(), **frames}, sort_keys=True)
    camera = re.sub(r"[^A-Za-z0-9_]", "_", provenance.camera_key.rpartition(".")[2])[:32]
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return f"{camera}-{provenance.token_kind}-stride{provenance.frame_stride}-{digest}"


def cache_folder() -> Path:
    """Where the cache lies: `$HF_LEROBOT_HOME/lam_tokens/stores`."""
    return HF_LEROBOT_HOME / "lam_tokens" / "stores"


def live_cache_folder() -> Path:
    """Where `--policy.lam_live_cache=auto` keeps tokens: `$HF_LEROBOT_HOME/lam_tokens/pairs`."""
    return HF_LEROBOT_HOME / "lam_tokens" / "pairs"


def live_caches(root: Path | None = None) -> list[Path]:
    """Folders of all `tokens.pairs.PairCache`s there, by name."""
    return sorted(path for path in (root or live_cache_folder()).glob("[!.]*") if is_pair_cache(path))


def cached_entries(cache: Path | None = None) -> list["CacheEntry"]:
    """Every store in the cache, finished or not, by name."""
    cache = cache or cache_folder()
    folders = [path for path in cache.glob("[!.]*") if path.is_dir()]
    return [
        CacheEntry(cache, name) for name in sorted({path.name.removesuffix(".shards") for path in folders})
    ]


@dataclass(frozen=True)
class CacheEntry:
    """One store's place in the cache, whether or not it is there."""

    cache: Path
    name: str

    @classmethod
    def of(cls, provenance: Provenance, cache: Path | None = None) -> "CacheEntry":
        return cls(cache or cache_folder(), cache_name(provenance))

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self.cache / self.name

    @property
    def is_finished(self) -> bool:
        return (self.folder / PROVENANCE_FILE).is_file()

    def open(self, dataset_meta: Any, build: Callable[[Path], object]) -> TokenStore:
        """Open the store, built first if it is missing; wait while another process builds it.

        Args:
            dataset_meta: `LeRobotDatasetMetadata` of the dataset that it is for.
            build: Makes the store in the folder that it is given, or resumes an interrupted build there.

        Raises:
            ExtractionError: the cache is not writable, or the store in it is damaged.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self._lock_file, wait=True))
            except OSError as error:
                if self.is_finished:  # a shared cache that may only be read
                    return self._opened(dataset_meta)
                raise ExtractionError(
                    f"the cache of token stores {self.cache} is not writable ({error}): set HF_LEROBOT_HOME "
                    "to a folder of yours, or make a store with lerobot-lam-precompute and pass its path"
                ) from error
            if not self.is_finished:
                build(self.folder)
            store = self._opened(dataset_meta)
            with contextlib.suppress(OSError):  # of another user: no reason not to train
                os.utime(self.folder)  # its files keep their times, which tell that they were checked
            return store

    def is_held(self) -> bool:
        """Whether another process is building, opening or removing the store now."""
        if not self._lock_file.exists():
            return False
        try:
            with locked(self._lock_file, wait=False):
                return False
        except Timeout:
            return True
        except OSError:  # not ours to lock
            return False

    def provenance(self) -> Provenance:
        """What the tokens are, or will be.

        Raises:
            UserError: it is damaged.
        """
        if self.is_finished:
            return Provenance.read(self.folder / PROVENANCE_FILE)
        return ShardFolder.open(unfinished_folder(self.folder)).plan.provenance

    def shards(self) -> tuple[int, int]:
        """Numbers of finished shards and of all shards in an unfinished extraction.

        Raises:
            UserError: it is damaged.
        """
        return ShardFolder.open(unfinished_folder(self.folder)).progress()

    def last_used(self) -> float:
        """When the store was last opened, or its extraction last made progress; seconds since the epoch."""
        places = (self.folder, self.folder / PROVENANCE_FILE, unfinished_folder(self.folder))
        times = []
        for place in places:
            with contextlib.suppress(OSError):
                times.append(place.stat().st_mtime)
        return max(times, default=0.0)

    def num_bytes(self) -> int:
        """On disk."""
        total = 0
        for folder in (self.folder, unfinished_folder(self.folder)):
            for file in folder.glob("*"):
                with contextlib.suppress(OSError):  # an extraction is running
                    total += file.stat().st_size
        return total

    def remove(self, older_than: float | None = None) -> int | None:
        """Remove the store and what is left of its extraction, unless a process holds it.

        A process that has the store mapped keeps the bytes that it maps.

        Args:
            older_than: Only if last used before that time.

        Returns:
            Bytes that were freed; None: a process holds it, or it was used since.
        """
        try:
            with locked(self._lock_file, wait=False):
                if older_than is not None and self.last_used() >= older_than:
                    return None
                freed = self.num_bytes()
                remove_whole(self.folder)
                remove_partial(self.folder)
                shutil.rmtree(unfinished_folder(self.folder), ignore_errors=True)
                return freed  # the lock's file stays: others may wait on that very file
        except Timeout:
            return None

    def _opened(self, dataset_meta: Any) -> TokenStore:
        try:
            return TokenStore.open(self.folder, dataset_meta)
        except TokenStoreError as error:
            raise ExtractionError(
                f"{error}. It is in the cache: remove {self.folder}, and it is built again"
            ) from error

    @property
    def _lock_file(self) -> Path:
        return self.cache / LOCKS / f"{self.name}.lock"
