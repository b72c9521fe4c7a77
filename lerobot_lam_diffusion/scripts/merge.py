"""`lerobot-lam-tokens merge`."""

from dataclasses import dataclass, field
from pathlib import Path

from lerobot_lam_diffusion.precompute.merge import merge_unfinished
from lerobot_lam_diffusion.scripts.cache import means_live_cache
from lerobot_lam_diffusion.scripts.command_line import DatasetSource, LamFlags
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.merge import merge_stores
from lerobot_lam_diffusion.utils.errors import UserError


@dataclass
class MergeConfig:
    """Put partial stores together, or the shards of an unfinished extraction, or a live cache's episodes.

    Args:
        stores: Their folders, or repositories on the Hub; or the extraction's --output_dir, or the live
            cache, alone.
        output_dir: Where the new store will stand; not for an extraction.
        dataset: With a live cache: the dataset that it was filled from, whose pixels are compared.
        lam: With a live cache: the LAM that filled it, which encodes what training did not visit.
        tolerance_s: With a live cache, as in lerobot-train: how far a frame may lie from its timestamp, in
            seconds.
    """

    output_dir: Path | None = None
    dataset: DatasetSource | None = None
    lam: LamFlags | None = None
    tolerance_s: float = 1e-4
    stores: list[str] = field(default_factory=list)


def merge(config: MergeConfig) -> None:
    paths = config.stores
    live_cache = means_live_cache(paths[0]) if len(paths) == 1 else None
    if live_cache is not None:
        from lerobot_lam_diffusion.scripts.live_cache import merge_live_cache

        store = merge_live_cache(live_cache, config)
    elif config.dataset is not None or config.lam is not None:
        raise UserError(
            f"--dataset and --lam are for the merging of one live cache, and {', '.join(paths) or 'nothing'} "
            "is none: leave them out, or correct the path"
        )
    elif config.output_dir is None:
        if len(paths) != 1:
            raise UserError(
                "--output_dir is unset: name where the new store will stand, or an unfinished extraction "
                "alone"
            )
        store = merge_unfinished(Path(paths[0]).expanduser())
    else:
        store = merge_stores([TokenStore.open(path) for path in paths], config.output_dir)
    print(f"{store.path}: {len(store.values)} frames; {store.coverage}")
