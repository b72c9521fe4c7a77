"""What a command line opens before it works: metadata first, so that bad input is told at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lerobot.configs.default import DatasetConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import CompatibilityError
from lerobot.utils.constants import HF_LEROBOT_HOME
from lerobot.utils.device_utils import auto_select_torch_device

from lerobot_lam_diffusion.problems import DatasetError, UserError


def usable_device(device: str | None) -> str:
    """The device to compute on, found out before the dataset and the LAM are read."""
    if device is None:
        if not any(each.is_available() for each in (torch.cuda, torch.backends.mps, torch.xpu)):
            return "cpu"  # of which LeRobot would warn
        return auto_select_torch_device().type
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device={device} cannot be used here ({reason}); expected cuda, mps or cpu, or leave it out "
            "for the best there is"
        ) from error
    return device


def open_metadata(config: DatasetConfig) -> LeRobotDatasetMetadata:
    """The dataset's metadata.

    Raises:
        UserError: it is not there, older than LeRobot's v3, or `--dataset.episodes` names episodes that it
            does not have.
    """
    with _refusing_old_formats(config):
        try:
            meta = LeRobotDatasetMetadata(config.repo_id, root=config.root, revision=config.revision)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            root = Path(config.root or HF_LEROBOT_HOME / config.repo_id)
            if config.root is not None and not Path(config.root).is_dir():
                raise DatasetError(
                    f"there is no folder {root}: correct --dataset.root, or leave it out for one of the "
                    "Hub or in LeRobot's home"
                ) from error
            if any(root.glob("*.lance")) or any((root / "data").glob("**/*.lance")):
                raise DatasetError(
                    f"dataset {config.repo_id!r} at {root} is in the Lance layout (*.lance), which LeRobot "
                    "0.6 cannot read: name the dataset in LeRobot's own layout that it was converted from"
                ) from error
            raise DatasetError(
                f"dataset {config.repo_id!r} cannot be opened at {root} nor "
                f"fetched from the Hub ({reason}); correct --dataset.repo_id or --dataset.root"
            ) from error
    _refuse_unknown_episodes(config.episodes, meta)
    return meta


def open_dataset(config: DatasetConfig, tolerance_s: float = 1e-4) -> LeRobotDataset:
    """The dataset, or those episodes of it, frames as uint8; `open_metadata` tells first what is wrong."""
    with _refusing_old_formats(config):
        return LeRobotDataset(
            config.repo_id,
            root=config.root,
            episodes=config.episodes,
            revision=config.revision,
            video_backend=config.video_backend,
            tolerance_s=tolerance_s,
            return_uint8=True,
        )


@contextmanager
def _refusing_old_formats(config: DatasetConfig) -> Iterator[None]:
    """LeRobot's error about a format that it does not read any more, as one of ours with its own hint."""
    try:
        yield
    except (CompatibilityError, NotImplementedError) as error:
        here = f" --root={config.root} --push-to-hub=false" if config.root is not None else ""
        raise DatasetError(
            f"dataset {config.repo_id!r} is in an older format than LeRobot's v3.0; convert it by python -m "
            f"lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={config.repo_id}{here} (it has to be in "
            "v2.1 for that)"
        ) from error


def _refuse_unknown_episodes(episodes: list[int] | None, meta: LeRobotDatasetMetadata) -> None:
    unknown = [episode for episode in episodes or [] if episode >= meta.total_episodes]
    if unknown:
        raise UserError(
            f"--dataset.episodes names {unknown}, but dataset {meta.repo_id!r} has the episodes 0 to "
            f"{meta.total_episodes - 1}; leave out the others"
        )
