"""Token stores under LeRobot's home, named by what decides their tokens, and built when first asked for.

    stores/<name>/             a finished store
    stores/<name>.shards/      its extraction, under way or interrupted
    stores/.locks/<name>.*     lock: held while the store is built, opened or removed; builder: who builds;
                               used: its time tells when the store was last opened

Experiments share a store because its name follows from its content, not from what a user calls things. Who
needs a store that another process builds waits for that process's lock. The kernel frees the lock of a
process that dies, and the next one goes on with the shards that are there.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lerobot.utils.constants import HF_LEROBOT_HOME

from lerobot_lam_diffusion.precompute.merge import Extraction
from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TokenStoreError, unfinished_folder
from lerobot_lam_diffusion.tokens.pair_cache import is_pair_cache
from lerobot_lam_diffusion.tokens.provenance import Provenance
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.tensor_file import NOT_SUPPORTED
from lerobot_lam_diffusion.tokens.writer import remove_partial

logger = logging.getLogger(__name__)

LOCKS = ".locks"
KEY_FORMAT = 1  # to be raised where the same key would stand for other tokens
QUIET_SECONDS = 2.0  # who only opens a store holds its lock no longer
TOLD_AGAIN_SECONDS = 300.0


class CacheError(UserError):
    """The cache cannot be used, or what lies in it is damaged."""

    section = "extraction"


@dataclass(frozen=True)
class CacheKey:
    """What decides the tokens of a store that covers all of a dataset.

    Attributes:
        dataset_digest: See `frames_digest.frames_digest`; it and the next two tell the frames. Where not all
            files are there, `binding.dataset_digest`.
        total_frames, fps: Of the dataset.
        lam_fingerprint: Which LAM.
        camera_key: The dataset's name of the camera.
        frame_stride: Gap of a pair, in frames.
        token_kind: "vq" or "continuous".
        dtype: Arithmetic of the encoder.
        decoder: The way from files to pixels: "pyav", "torchcodec", "images".
        device: Kind of device: "cpu", "cuda", "mps".
    """

    dataset_digest: str
    total_frames: int
    fps: float
    lam_fingerprint: str
    camera_key: str
    frame_stride: int
    token_kind: str
    dtype: str
    decoder: str
    device: str

    @classmethod
    def of(cls, provenance: Provenance, decoder: str) -> "CacheKey":
        """Of the tokens that `provenance` describes, whose pixels come by `decoder`."""
        return cls(
            dataset_digest=provenance.dataset.frames or provenance.dataset.digest,
            total_frames=provenance.dataset.total_frames,
            fps=float(provenance.dataset.fps),
            lam_fingerprint=provenance.lam.fingerprint,
            camera_key=provenance.camera_key,
            frame_stride=provenance.frame_stride,
            token_kind=provenance.token_kind,
            dtype=provenance.dtype,
            decoder=decoder,
            device=provenance.device,
        )

    def of_other_frames(self, provenance: Provenance) -> "CacheKey":
        """The key of `provenance`, but of this key's frames: equal to this one if all else is equal."""
        other = CacheKey.of(provenance, provenance.decoder)
        return dataclasses.replace(other, dataset_digest=self.dataset_digest, total_frames=self.total_frames)

    @property
    def name(self) -> str:
        """For people at its start, unique at its end: `top-vq-stride1-0123456789abcdef`."""
        told = json.dumps({"format": KEY_FORMAT, **dataclasses.asdict(self)}, sort_keys=True)
        camera = re.sub(r"[^A-Za-z0-9_]", "_", self.camera_key.rpartition(".")[2])[:32]
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        return f"{camera}-{self.token_kind}-stride{self.frame_stride}-{digest}"


def cache_folder() -> Path:
    """Where the cache lies: `$HF_LEROBOT_HOME/lam_tokens/stores`."""
    return HF_LEROBOT_HOME / "lam_tokens" / "stores"


def live_cache_folder() -> Path:
    """Where `--policy.lam_live_cache=auto` keeps tokens: `$HF_LEROBOT_HOME/lam_tokens/pairs`."""
    return HF_LEROBOT_HOME / "lam_tokens" / "pairs"


def live_caches(root: Path | None = None) -> list[Path]:
    """Folders of all `tokens.pair_cache.PairCache`s there, by name."""
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
    def of(cls, key: CacheKey, cache: Path | None = None) -> "CacheEntry":
        return cls(cache or cache_folder(), key.name)

    @property
    def folder(self) -> Path:
        """Of the store."""
        return self.cache / self.name

    @property
    def is_finished(self) -> bool:
        return (self.folder / PROVENANCE_FILE).is_file()

    def open(self, dataset_meta: Any, build: Callable[[Path], object]) -> TokenStore:
        """The store, built first if it is not there; while another process builds it, wait.

        Args:
            dataset_meta: `LeRobotDatasetMetadata` of the dataset that it is for.
            build: Makes the store in the folder that it is given, or goes on with what an interrupted one
                left there.

        Raises:
            CacheError: the cache is not writable, or the store in it is damaged.
        """
        try:
            with self._waited_for():
                if not self.is_finished:
                    with self._known_as_builder():
                        build(self.folder)
                store = self._opened(dataset_meta)
                with contextlib.suppress(OSError):  # a full disk is no reason not to train
                    self._mark("used").touch()
                return store
        except _NoLockError as error:
            if self.is_finished:  # a cache that others filled, and that may only be read here
                return self._opened(dataset_meta)
            raise CacheError(
                f"the cache of token stores {self.cache} is not writable ({error}): set HF_LEROBOT_HOME to a "
                "folder of yours, or make a store with lerobot-lam-precompute and pass its path"
            ) from error

    def builder(self) -> str | None:
        """Who is building (or opening, or removing) the store at this moment, for people; None: nobody."""
        if not self._mark("lock").exists():
            return None
        try:
            with FileLock(self._mark("lock")).acquire(blocking=False):
                return None
        except Timeout:
            return self._holder()
        except (OSError, NotImplementedError):  # no locks here, or not ours to take
            return self._holder() if self._mark("builder").exists() else None

    def provenance(self) -> Provenance:
        """What the tokens are, or will be.

        Raises:
            UserError: it is damaged.
        """
        if self.is_finished:
            return Provenance.read(self.folder / PROVENANCE_FILE)
        return Extraction.read(unfinished_folder(self.folder)).provenance

    def shards(self) -> tuple[int, int]:
        """Of an unfinished extraction: shards that are safe, and all.

        Raises:
            UserError: it is damaged.
        """
        unfinished = unfinished_folder(self.folder)
        extraction = Extraction.read(unfinished)
        return len(extraction.shards(unfinished).present()), len(extraction.plan.shards)

    def last_used(self) -> float:
        """When the store was last opened, or its extraction last went on; seconds since the epoch."""
        places = (
            self._mark("used"),
            self.folder / PROVENANCE_FILE,
            unfinished_folder(self.folder),
            self.folder,
        )
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
                with contextlib.suppress(OSError):  # an extraction goes on
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
        self._mark("lock").parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._held():
                if older_than is not None and self.last_used() >= older_than:
                    return None
                freed = self.num_bytes()
                removed = self.cache / f".{self.name}.partial-removed"  # killed here, the next one tidies up
                remove_partial(self.folder)
                if self.folder.exists():
                    self.folder.rename(removed)  # never half a store under its name
                remove_partial(self.folder)
                shutil.rmtree(unfinished_folder(self.folder), ignore_errors=True)
                for mark in ("builder", "used"):
                    self._mark(mark).unlink(missing_ok=True)
                return freed  # the lock's file stays: others may wait for that very file
        except Timeout:
            return None

    def _opened(self, dataset_meta: Any) -> TokenStore:
        try:
            return TokenStore.open(self.folder, dataset_meta)
        except TokenStoreError as error:
            raise CacheError(
                f"{error}. It lies in the cache: remove {self.folder}, and it is built again"
            ) from error

    def _held(self) -> contextlib.AbstractContextManager:
        """The lock, taken at once; nothing where the file system has no locks.

        Raises:
            Timeout: a process holds it.
        """
        try:
            return FileLock(self._mark("lock")).acquire(blocking=False)
        except (OSError, NotImplementedError) as error:
            if not _means_no_locks(error):
                raise
            if self._mark("builder").exists():
                raise Timeout(str(self._mark("lock"))) from error
            return contextlib.nullcontext()

    @contextlib.contextmanager
    def _waited_for(self) -> Iterator[None]:
        """Hold the lock; whoever has to wait for it says for whom.

        Without locks nobody waits: processes that build the same store share its shards.
        """
        lock = FileLock(self._mark("lock"))
        patience = QUIET_SECONDS
        while not lock.is_locked:
            try:
                self._mark("lock").parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=patience, poll_interval=0.2)
            except Timeout:
                logger.info("Waiting for %s to be done with the token store %s.", self._holder(), self.folder)
                patience = TOLD_AGAIN_SECONDS
            except (OSError, NotImplementedError) as error:
                if not _means_no_locks(error):
                    raise _NoLockError(str(error)) from error
                logger.warning("%s cannot be locked (%s); going on without.", self.cache, error)
                break
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _known_as_builder(self) -> Iterator[None]:
        mark = self._mark("builder")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        mark.write_text(
            f"process {os.getpid()} on {os.uname().nodename} (building since {since})", encoding="utf-8"
        )
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            return self._mark("builder").read_text(encoding="utf-8") or "another process"
        return "another process"

    def _mark(self, what: str) -> Path:
        return self.cache / LOCKS / f"{self.name}.{what}"


def _means_no_locks(error: Exception) -> bool:
    """Whether the file system has no locks (some network disks), rather than no access."""
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in NOT_SUPPORTED


class _NoLockError(Exception):
    """The lock's file cannot be made or opened."""
