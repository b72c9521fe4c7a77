"""`lerobot-lam-tokens verify`; LeRobot is imported when there is a dataset."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lerobot_lam_diffusion.constants import OBS_LAM_TOKENS
from lerobot_lam_diffusion.scripts.cache import means_live_cache
from lerobot_lam_diffusion.scripts.command_line import DatasetSource, LamFlags
from lerobot_lam_diffusion.scripts.next_step import next_step, train_on
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.binding import check_binding
from lerobot_lam_diffusion.tokens.layout import TENSORS_FILE
from lerobot_lam_diffusion.tokens.locating import check_located, locate_store
from lerobot_lam_diffusion.utils.errors import TokenStoreError, UserError

if TYPE_CHECKING:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset


@dataclass
class VerifyConfig:
    """Check a store, or a dataset's column of tokens.

    Args:
        store: Its folder, or its repository on the Hub; a live cache; or a `.pt` file, which needs the
            dataset. A dataset's folder, or left out: the column of that dataset.
        column: Of the dataset.
        dataset: Check that the store was made of this dataset.
        lam: With a dataset: encode a random sample again with this LAM and compare.
        camera_key: Of a `.pt` file: the camera that the LAM looked at, where the dataset has several.
        num_samples: Tokens in that sample.
        seed: Of the sample.
        tolerance_s: As in lerobot-train: how far a frame may lie from its timestamp, in seconds.
        device: Where the LAM runs; the best there is if left out.
    """

    store: str | None = None
    column: str = OBS_LAM_TOKENS
    dataset: DatasetSource | None = None
    lam: LamFlags | None = None
    camera_key: str | None = None
    num_samples: int = 64
    seed: int = 0
    tolerance_s: float = 1e-4
    device: str | None = None


def verify(config: VerifyConfig) -> None:
    if config.store is None or (Path(config.store) / "meta" / "info.json").is_file():
        from lerobot_lam_diffusion.scripts.column import verify_dataset

        verify_dataset(config)
        return
    if config.lam is not None and config.dataset is None:
        raise UserError(
            "--lam.path needs --dataset.repo_id as well: the LAM's tokens are those of its frames"
        )
    live_cache = means_live_cache(config.store)
    if live_cache is not None:
        from lerobot_lam_diffusion.scripts.live_cache import verify_live_cache

        verify_live_cache(live_cache, config)
        return
    store = _read_again(config.store, config.dataset)
    if config.dataset is not None:
        _verify_of_dataset(store, config.dataset, config)
        training = train_on(store, config.store, config.dataset.repo_id, config.dataset.root)
        print(next_step(training, fps=store.provenance.dataset.fps if store.provenance else None))


def _verify_of_dataset(store: TokenStore, source: DatasetSource, config: VerifyConfig) -> None:
    """That the store was made of the dataset, and, where a LAM is named, by that one."""
    from lerobot_lam_diffusion.precompute.recompute import recompute_sample
    from lerobot_lam_diffusion.scripts.inputs import open_dataset

    dataset, dtype = open_dataset(source, config.tolerance_s), "float32"
    if store.provenance is not None:
        dtype = store.provenance.dtype
        try:
            check_binding(store, dataset.meta)
        except TokenStoreError:
            _refuse_damaged_files(dataset, store.provenance.camera_key)
            raise
        print(f"ok  made of dataset {dataset.repo_id} at {dataset.root}")
    if config.lam is None:
        return
    lam = config.lam.load(config.device, dtype)
    result = recompute_sample(store, dataset, lam, config.num_samples, config.seed, config.camera_key)
    if result.equal < result.checked:
        raise TokenStoreError(
            f"{result.text}: the frames or the LAM changed, or the store was made on another kind of device. "
            "Extract the tokens again with lerobot-lam-precompute"
        )
    print(f"ok  {result.text}")


def _read_again(name: str, dataset: DatasetSource | None) -> TokenStore:
    path, hub_id = locate_store(name)
    meta = None
    if dataset is not None:
        from lerobot_lam_diffusion.scripts.inputs import open_metadata

        meta = open_metadata(dataset)
    if path.suffix in (".pt", ".pth") and path.is_file():
        store = TokenStore.open(path, meta)
        print("ok  all values valid, a row for each frame of the dataset")
        return store
    check_located(path, hub_id, again=True)
    store = TokenStore.open(name)
    print(f"ok  every byte of {TENSORS_FILE} as written, all values valid ({store.coverage})")
    return store


def _refuse_damaged_files(dataset: "LeRobotDataset", camera_key: str) -> None:
    """Name the file that cannot be read, if that is why the dataset's frames are not the store's."""
    from lerobot_lam_diffusion.precompute.frames import EpisodeFrames

    if camera_key in dataset.meta.camera_keys:
        EpisodeFrames(dataset, camera_key).check(range(dataset.meta.total_episodes))
