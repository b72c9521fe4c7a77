"""`lerobot-lam-tokens cache …`: what `lam_tokens_path=auto` built and `lam_live_cache=auto` keeps."""

import time
from dataclasses import dataclass
from pathlib import Path

from lerobot_lam_diffusion.precompute.cache import (
    CacheEntry,
    cache_folder,
    cached_entries,
    live_cache_folder,
    live_caches,
)
from lerobot_lam_diffusion.scripts.command_line import counted
from lerobot_lam_diffusion.tokens.pairs import PairCache, bytes_on_disk, is_pair_cache, last_used
from lerobot_lam_diffusion.tokens.provenance import Provenance
from lerobot_lam_diffusion.utils.errors import TokenStoreError, UserError
from lerobot_lam_diffusion.utils.files import remove_whole

DAY = 86400.0


@dataclass
class CacheListConfig:
    """What the cache holds."""


@dataclass
class CachePathConfig:
    """Where the cache lies: stores of `auto` in stores/, live caches in pairs/. Prints nothing else."""


@dataclass
class CachePruneConfig:
    """Remove stores, interrupted extractions and live caches; never what a process is building.

    A training on this machine keeps what it has open; do not prune a cache that other machines train from.

    Args:
        older_than_days: Those that were not used for so long.
        all: Every one.
    """

    older_than_days: float | None = None
    all: bool = False


def list_cache(config: CacheListConfig) -> None:
    entries = cached_entries()
    for entry in entries:
        print(entry.name)
        for name, text in _rows(entry).items():
            print(f"    {name:<10}{text}")
    total = sum(entry.num_bytes() for entry in entries)
    print(f"{counted(len(entries), 'token store')}, {total:,} bytes in {cache_folder()}")
    caches = live_caches()
    for path in caches:
        print(path.name)
        for name, text in live_rows(path).items():
            print(f"    {name:<10}{text}")
    if caches:
        print(f"{counted(len(caches), 'live cache')} (--policy.lam_live_cache=auto) in {live_cache_folder()}")


def cache_path(config: CachePathConfig) -> None:
    print(cache_folder().parent)


def prune_cache(config: CachePruneConfig) -> None:
    if config.all == (config.older_than_days is not None) or (config.older_than_days or 0) < 0:
        raise UserError(
            "say which stores to remove: --older_than_days=<days since they were last used>, or --all=true"
        )
    limit = None if config.older_than_days is None else time.time() - config.older_than_days * DAY
    removed, freed = 0, 0
    for entry in cached_entries():
        dataset = _dataset_of(entry)
        num_bytes = entry.remove(older_than=limit)
        if num_bytes is not None:
            removed, freed = removed + 1, freed + num_bytes
            print(f"removed {entry.name} ({dataset}), {num_bytes:,} bytes")
        elif entry.is_held():
            print(f"kept    {entry.name} ({dataset}): another process is building or opening it")
    print(f"{counted(removed, 'token store')} removed, {freed:,} bytes")
    pruned = [num_bytes for num_bytes in (_prune_live(path, limit) for path in live_caches()) if num_bytes]
    if pruned or not removed:
        print(f"{counted(len(pruned), 'live cache')} removed, {sum(pruned):,} bytes")


def _rows(entry: CacheEntry) -> dict[str, str]:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used()))
    rows = {"size": f"{entry.num_bytes():,} bytes", "last used": used}
    try:
        if not entry.is_finished:
            finished, total = entry.shards()
            held = entry.is_held()
            state = "another process is building it" if held else "interrupted; training with auto resumes it"
            rows = {"state": f"{finished} of {total} shards: {state}", **rows}
        provenance = entry.provenance()
    except UserError as error:
        return {"damaged": str(error), **rows}
    return {**_facts(provenance), **rows}


def _facts(provenance: Provenance) -> dict[str, str]:
    source, lam = provenance.dataset, provenance.lam
    return {
        "dataset": f"{source.repo_id} ({source.total_frames} frames, {source.total_episodes} episodes)",
        "LAM": f"{lam.path} (fingerprint {lam.fingerprint[:16]}…)",
        "camera": f"{provenance.camera_key}, stride {provenance.frame_stride} frames",
        "tokens": f"{provenance.token_kind}, encoded in {provenance.dtype} on {provenance.device}",
    }


def means_live_cache(name: str | None) -> Path | None:
    """The folder of the live cache that `name` means: a path, or a name that `cache list` shows.

    Raises:
        TokenStoreError: it is a folder of several caches, as `--policy.lam_live_cache=FOLDER` fills it.
    """
    if name is None:
        return None
    for folder in (Path(name).expanduser(), live_cache_folder() / name):
        if is_pair_cache(folder):
            return folder
    inside = [cache for cache in sorted(Path(name).expanduser().glob("*")) if is_pair_cache(cache)]
    if len(inside) > 1:
        listed = "".join(f"\n  {cache}" for cache in inside)
        raise TokenStoreError(f"{name} holds {len(inside)} live caches, name one of them:{listed}")
    return inside[0] if inside else None


def live_rows(path: Path) -> dict[str, str]:
    """What a live cache holds, for people."""
    try:
        cache = PairCache.open(path)
        known = sum(len(frames) for frames, _, _ in cache.scan())
    except UserError as error:
        return {"damaged": str(error)}
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(last_used(path)))
    return {
        **_facts(cache.provenance),
        "pairs": f"{known:,} of {cache.num_pairs:,} are kept",
        "size": f"{bytes_on_disk(path):,} bytes",
        "last used": used,
    }


def _prune_live(path: Path, limit: float | None) -> int:
    """Bytes that were freed."""
    if limit is not None and last_used(path) >= limit:
        return 0
    num_bytes = bytes_on_disk(path)
    remove_whole(path)
    print(f"removed live cache {path.name}, {num_bytes:,} bytes")
    return num_bytes


def _dataset_of(entry: CacheEntry) -> str:
    try:
        return entry.provenance().dataset.repo_id
    except UserError:
        return "damaged"
