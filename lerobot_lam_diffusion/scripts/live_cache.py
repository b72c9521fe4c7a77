"""`lerobot-lam-tokens verify|merge` of a live cache, which `--policy.lam_live_cache` fills."""

from pathlib import Path
from typing import TYPE_CHECKING

from lerobot_lam_diffusion.precompute.live_store import store_of_live_cache
from lerobot_lam_diffusion.precompute.recompute import recompute_kept
from lerobot_lam_diffusion.scripts.command_line import counted
from lerobot_lam_diffusion.scripts.inputs import open_dataset
from lerobot_lam_diffusion.tokens.binding import check_binding
from lerobot_lam_diffusion.tokens.layout import check_content
from lerobot_lam_diffusion.tokens.pairs import TABLES, PairCache
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import TokenStoreError
from lerobot_lam_diffusion.utils.files import refuse_existing

if TYPE_CHECKING:
    from lerobot_lam_diffusion.scripts.merge import MergeConfig
    from lerobot_lam_diffusion.scripts.verify import VerifyConfig


def verify_live_cache(folder: Path, config: "VerifyConfig") -> None:
    """Read every record; with a dataset and a LAM encode a sample again."""
    check_content(folder / TABLES, again=True)
    cache = PairCache.open(folder)
    known, damaged = 0, 0
    for frames, _, bad in cache.scan():
        known, damaged = known + len(frames), damaged + bad
    print(f"ok  {known:,} of {cache.num_pairs:,} pairs are kept, every record of them as written")
    if damaged:
        print(f"ok  {damaged} records were left half written; they count as not there")
    if config.dataset is None:
        return
    dataset = open_dataset(config.dataset, config.tolerance_s)
    check_binding(cache.tables, dataset.meta)
    print(f"ok  made of dataset {dataset.repo_id} at {dataset.root}")
    if config.lam is None:
        return
    lam = config.lam.load(config.device, cache.provenance.dtype)
    result, others = recompute_kept(cache, dataset, lam, config.num_samples, config.seed)
    if others:
        print(
            f"note: {others} sampled tokens were made of other pixels than the dataset's (augmentation, "
            "another decoder) and cannot be compared; training computes such tokens again"
        )
    if result.equal < result.checked:
        raise TokenStoreError(f"{result.text}: another kind of device, or a damaged cache. Remove {folder}")
    print(f"ok  {result.text}")


def merge_live_cache(folder: Path, config: "MergeConfig") -> TokenStore:
    """Write a token store that holds those tokens which were made from the dataset's own pixels.

    Tokens that training did not visit are encoded now, on the kind of device that made the others: another
    kind may round differently.
    """
    if config.dataset is None or config.lam is None or config.output_dir is None:
        raise TokenStoreError(
            f"{folder} is a live cache, whose merging needs --dataset.repo_id (the dataset whose pixels are "
            "compared with the cache's), --lam.path (which encodes what training did not visit) and "
            "--output_dir (the folder of the new store)"
        )
    refuse_existing(config.output_dir)
    cache, dataset = PairCache.open(folder), open_dataset(config.dataset, config.tolerance_s)
    lam = config.lam.load(cache.provenance.device, cache.provenance.dtype)
    store, encoded = store_of_live_cache(cache, dataset, config.output_dir, lam)
    if encoded:
        print(f"{counted(encoded, 'pair')} encoded now")
    return store
