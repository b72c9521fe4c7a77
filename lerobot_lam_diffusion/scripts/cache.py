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
    entries, caches = cached_entries(), live_caches()
    rows = {entry.name: _rows(entry) for entry in entries} | {path.name: live_rows(path) for path in caches}
    for name, own in rows.items():
        print(name)
        for title, text in own.items():
            print(f"    {title:<10}{text}")
    total = sum(entry.num_bytes() for entry in entries)
    print(f"{counted(len(entries), 'token store')}, {total:,} bytes in {cache_folder()}")
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
    freed: dict[str, int] = {}
    for entry in cached_entries():
        num_bytes = entry.remove(older_than=limit)
        if num_bytes is not None:
            freed[entry.name] = num_bytes
        elif entry.is_held():
            print(f"kept    {entry.name}: another process is building or opening it")
    for path in live_caches():
        if limit is None or last_used(path) < limit:
            freed[path.name] = bytes_on_disk(path)
            remove_whole(path)
    for name, num_bytes in freed.items():
        print(f"removed {name}, {num_bytes:,} bytes")
    print(f"{len(freed)} removed, {sum(freed.values()):,} bytes")


def _rows(entry: CacheEntry) -> dict[str, str]:
    """What a store holds, human-readable."""
    rows = {"size": f"{entry.num_bytes():,} bytes", "last used": _day(entry.last_used())}
    try:
        if not entry.is_finished:
            finished, total = entry.shards()
            held = entry.is_held()
            state = "another process is building it" if held else "interrupted; training with auto resumes it"
            rows = {"state": f"{finished} of {total} shards: {state}", **rows}
        return {**_facts(entry.provenance()), **rows}
    except UserError as error:
        return {"damaged": str(error), **rows}


def live_rows(path: Path) -> dict[str, str]:
    """What a live cache holds, human-readable."""
    rows = {"size": f"{bytes_on_disk(path):,} bytes", "last used": _day(last_used(path))}
    try:
        cache = PairCache.open(path)
        known = sum(len(frames) for frames, _, _ in cache.scan())
        pairs = f"{known:,} of {cache.num_pairs:,} are kept"
        return {**_facts(cache.provenance), "pairs": pairs, **rows}
    except UserError as error:
        return {"damaged": str(error), **rows}


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


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
