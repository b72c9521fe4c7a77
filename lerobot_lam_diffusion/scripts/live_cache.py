"""`lerobot-lam-tokens verify|merge` of a live cache, which `--policy.lam_live_cache` fills."""

from pathlib import Path
from typing import TYPE_CHECKING

from lerobot_lam_diffusion.precompute.live_store import store_of_live_cache
from lerobot_lam_diffusion.precompute.recompute import recompute_kept
from lerobot_lam_diffusion.scripts.command_line import counted, usable_device
from lerobot_lam_diffusion.scripts.inputs import open_dataset
from lerobot_lam_diffusion.tokens.binding import check_binding
from lerobot_lam_diffusion.tokens.layout import check_content
from lerobot_lam_diffusion.tokens.pairs import TABLES, PairCache
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import TokenStoreError, UserError
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
    """Write a token store that holds those tokens which were made from the dataset's own pixels."""
    if config.dataset is None:
        raise TokenStoreError(
            "--dataset.repo_id is missing: the dataset whose pixels merge compares with the cache's"
        )
    if config.lam is None:
        raise TokenStoreError("--lam.path is missing: merge encodes what training did not visit")
    if config.output_dir is None:
        raise TokenStoreError(
            "--output_dir is missing: the folder where the store of the cache's tokens will stand"
        )
    refuse_existing(config.output_dir)
    cache, dataset = PairCache.open(folder), open_dataset(config.dataset, config.tolerance_s)
    lam = config.lam.load(_device_of(cache), cache.provenance.dtype)
    store, encoded = store_of_live_cache(cache, dataset, config.output_dir, lam)
    if encoded:
        print(f"{counted(encoded, 'pair')} {'was' if encoded == 1 else 'were'} encoded now")
    return store


def _device_of(cache: PairCache) -> str:
    """The kind of device that made its tokens: another kind may round differently."""
    try:
        return usable_device(cache.provenance.device)
    except UserError as error:
        raise TokenStoreError(
            f"{cache.path} was filled on {cache.provenance.device}, which is not available here: merge it on "
            "such a machine"
        ) from error
