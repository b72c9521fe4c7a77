"""`lerobot-lam-tokens info`."""

from dataclasses import dataclass
from pathlib import Path

from lerobot_lam_diffusion.scripts.cache import live_rows, means_live_cache
from lerobot_lam_diffusion.tokens import TokenStore
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
    assert store.provenance is not None
    source, lam = store.provenance.dataset, store.provenance.lam
    frames = len(store.values)
    missing = frames - store.num_tokens
    perplexity = store.code_perplexity()
    num_bytes = sum((store.path / name).stat().st_size for name in (TENSORS_FILE, PROVENANCE_FILE))
    rows = {
        "store": f"{store.hub_id or store.path.resolve()}, {num_bytes:,} bytes",
        "dataset": f"{source.repo_id} ({source.total_frames} frames, {source.total_episodes} episodes, "
        f"{source.fps:g} fps, revision {source.revision})",
        "coverage": f"{frames} frames, {missing} of them without a token; {store.coverage}",
        "camera": store.provenance.camera_key,
        "stride": f"{store.frame_stride} frames = {store.provenance.stride_seconds:g} s",
        "LAM": f"{lam.path} (fingerprint {lam.fingerprint[:16]}…)",
        "tokens": f"{store.kind}, {lam.num_learned_tokens} x {lam.action_latent_dim} numbers, "
        f"encoded in {store.provenance.dtype} on {store.provenance.device}",
        "storage": f"{store.provenance.storage_dtype}, largest error {store.provenance.max_error:.2g}",
        "codebook": ", ".join(f"{slot:.1f}" for slot in perplexity)
        + f" of {lam.num_codes} codes a slot (perplexity)",
        "skipped": "; ".join(f"episode {episode}: {reason}" for episode, reason in store.skipped.items()),
        "made with": ", ".join(f"{name} {version}" for name, version in store.provenance.versions.items()),
    }
    if not perplexity:
        del rows["codebook"]
    if not store.skipped:
        del rows["skipped"]
    for name, text in rows.items():
        print(f"{name:<10}{text}")


def _print_live_cache(folder: Path) -> None:
    print(folder)
    for name, text in live_rows(folder).items():
        print(f"{name:<10}{text}")
