"""`lerobot-lam-tokens info|verify|merge` of a live cache, which `--policy.lam_live_cache` fills."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lerobot.configs.default import DatasetConfig

from lerobot_lam_diffusion.constants import AUTO
from lerobot_lam_diffusion.precompute.cache import live_cache_folder
from lerobot_lam_diffusion.precompute.live_store import store_of_live_cache
from lerobot_lam_diffusion.precompute.recompute import recompute_kept
from lerobot_lam_diffusion.scripts.cache import live_rows
from lerobot_lam_diffusion.scripts.next_step import dataset_flags, next_step, training, verify_against
from lerobot_lam_diffusion.scripts.opening import open_dataset, usable_device
from lerobot_lam_diffusion.tokens.binding import check_binding
from lerobot_lam_diffusion.tokens.layout import check_content
from lerobot_lam_diffusion.tokens.pair_cache import TABLES, LiveCacheError, PairCache, is_pair_cache
from lerobot_lam_diffusion.tokens.provenance import VQ
from lerobot_lam_diffusion.tokens.store import TokenStore

if TYPE_CHECKING:
    from lerobot_lam_diffusion.scripts.tokens import MergeConfig, VerifyConfig


def means_live_cache(name: str | None) -> Path | None:
    """The folder of the live cache that `name` means: a path, or a name that `cache list` shows."""
    if name is None:
        return None
    for folder in (Path(name).expanduser(), live_cache_folder() / name):
        if is_pair_cache(folder):
            return folder
    return None


def print_live_cache(folder: Path) -> None:
    print(folder)
    for name, text in live_rows(folder).items():
        print(f"{name:<10}{text}")
    told = PairCache.open(folder).provenance
    print(next_step(verify_against(told, str(folder))))


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
        print(
            next_step(verify_against(cache.provenance, str(folder)), "Next, compare with its dataset and LAM")
        )
        return
    dataset = open_dataset(config.dataset)
    check_binding(cache.tables, dataset.meta)
    print(f"ok  made of dataset {dataset.repo_id} at {dataset.root}")
    if config.lam is None:
        print(_use_next(cache, known, config.dataset))
        return
    from lerobot_lam_diffusion.lam import load_lam

    dtype = getattr(torch, cache.provenance.dtype)
    lam = load_lam(
        config.lam.path, revision=config.lam.revision, device=usable_device(config.device), dtype=dtype
    )
    result, others = recompute_kept(cache, dataset, lam, config.num_samples, config.seed)
    if others:
        print(
            f"note: {others} sampled tokens were made of other pixels than the dataset's (augmentation, "
            "another decoder) and cannot be compared; training computes such tokens again"
        )
    told = f"{result.equal} of {result.checked} sampled tokens agree with the LAM"
    if result.equal < result.checked:
        raise LiveCacheError(f"{told}: another kind of device, or a damaged cache. Remove {folder}")
    print(f"ok  {told} ({result.distinct} different ones, largest difference {result.max_error:.2g})")
    print(_use_next(cache, known, config.dataset))


def _use_next(cache: PairCache, known: int, dataset: DatasetConfig) -> str:
    """Of a full cache a store is made, another one training goes on to fill."""
    flags = dataset_flags(dataset.repo_id, dataset.root)
    if known == cache.num_pairs:
        merge = ["lerobot-lam-tokens", "merge", str(cache.path), *flags, "--output_dir=lam_tokens"]
        return next_step(merge, "Next, make a store of it")
    told = cache.provenance
    is_own = cache.path.parent == live_cache_folder()
    train = training(
        dataset.repo_id,
        dataset.root,
        f"--policy.lam_model_path={told.lam.path}",
        f"--policy.lam_camera_key={told.camera_key}",
        *([] if told.frame_stride == 1 else [f"--policy.lam_frame_stride={told.frame_stride}"]),
        *([] if told.token_kind == VQ else ["--policy.lam_use_vq_tokens=false"]),
        f"--policy.lam_live_cache={AUTO if is_own else cache.path.parent}",
    )
    return next_step(train, "Next, train on it; the pairs that it lacks are added")


def merge_live_cache(folder: Path, config: "MergeConfig") -> TokenStore:
    """Its complete episodes as a token store, of those tokens that are of the dataset's own pixels."""
    missing = [f"--{name}" for name in ("output_dir", "dataset.repo_id") if _is_unset(config, name)]
    if missing:
        raise LiveCacheError(
            f"{' and '.join(missing)} unset: a live cache becomes a store with its dataset, whose pixels are "
            "compared, and --output_dir, where the store will stand"
        )
    assert config.output_dir is not None
    assert config.dataset is not None
    made = store_of_live_cache(PairCache.open(folder), open_dataset(config.dataset), config.output_dir)
    for count, why in (
        (made.incomplete, "lack pairs"),
        (made.other_pixels, "have tokens of other pixels (augmentation, another decoder)"),
    ):
        if count:
            print(f"left out: {count} episodes, which {why}")
    return made.store


def _is_unset(config: "MergeConfig", name: str) -> bool:
    return getattr(config, name.partition(".")[0]) is None
