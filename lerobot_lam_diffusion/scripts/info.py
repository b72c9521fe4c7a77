"""`lerobot-lam-tokens info`."""

from dataclasses import dataclass
from pathlib import Path

from lerobot_lam_diffusion.scripts.cache import live_rows, means_live_cache
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.described import described
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE


@dataclass
class InfoConfig:
    """What a store, or a live cache, holds.

    Args:
        store: Its folder, or its repository on the Hub; a live cache's folder, or its name in `cache list`.
    """

    store: str


def info(config: InfoConfig) -> None:
    live_cache = means_live_cache(config.store)
    if live_cache is not None:
        _print_live_cache(live_cache)
        return
    store = TokenStore.open(config.store)
    num_bytes = sum((store.path / name).stat().st_size for name in (TENSORS_FILE, PROVENANCE_FILE))
    rows = {"store": f"{store.hub_id or store.path.resolve()}, {num_bytes:,} bytes", **described(store)}
    if store.codebook is not None:
        perplexity = ", ".join(f"{slot:.1f}" for slot in store.code_perplexity())
        rows["codebook"] = f"{perplexity} of {len(store.codebook)} codes a slot (perplexity)"
    for episode, reason in store.skipped.items():
        rows[f"episode {episode}"] = f"skipped: {reason}"
    _print_rows(rows)


def _print_live_cache(folder: Path) -> None:
    print(folder)
    _print_rows(live_rows(folder))


def _print_rows(rows: dict[str, str]) -> None:
    for name, text in rows.items():
        print(f"{name:<16}{text}")
