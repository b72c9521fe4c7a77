"""What a command line opens before it works: metadata first, so that bad input is reported at once."""

from pathlib import Path
from typing import Any

from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.io_utils import load_info
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import (
    DEFAULT_TASKS_PATH,
    EPISODES_DIR,
    INFO_PATH,
    CompatibilityError,
)
from lerobot.utils.constants import HF_LEROBOT_HOME

from lerobot_lam_diffusion.precompute.dataset import is_local, open_readable, open_whole
from lerobot_lam_diffusion.scripts.command_line import DatasetSource
from lerobot_lam_diffusion.tokens.dataset_check import check_metadata
from lerobot_lam_diffusion.utils.errors import DatasetError, UserError, first_line, raise_problems


def open_metadata(config: DatasetSource) -> LeRobotDatasetMetadata:
    """The dataset's metadata.

    Raises:
        UserError: it is not there, older than LeRobot's v3, contradicts itself, or `--dataset.episodes` names
            episodes that it does not have.
    """
    raise_problems("these flags do not work", config.problems())
    root = Path(config.root or HF_LEROBOT_HOME / config.repo_id)
    try:
        _refuse_lance(config.repo_id, root)
        if config.root is not None and is_local(config.root):
            _refuse_absent_metadata(config.repo_id, Path(config.root))
        meta = LeRobotDatasetMetadata(config.repo_id, root=config.root, revision=config.revision)
    except DatasetError:
        raise
    except (CompatibilityError, NotImplementedError) as error:
        here = f" --root={config.root} --push-to-hub=false" if config.root is not None else ""
        raise DatasetError(
            f"dataset {config.repo_id!r} is in an older format than LeRobot's v3.0; convert it by python -m "
            f"lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={config.repo_id}{here} (it has to be in "
            "v2.1 for that)"
        ) from error
    except Exception as error:  # `datasets`, Arrow and the Hub's client have errors of their own
        reason = first_line(str(error) or type(error).__name__)  # `strerror` would not name the file
        raise DatasetError(
            f"the metadata of dataset {config.repo_id!r} cannot be read in {root / 'meta'}, nor fetched from "
            f"the Hub ({reason}); correct --dataset.repo_id or --dataset.root, or restore the files"
        ) from error
    check_metadata(meta)
    unknown = [episode for episode in config.episodes or [] if episode >= meta.total_episodes]
    if unknown:
        raise UserError(
            f"dataset {meta.repo_id!r} has the episodes 0 to {meta.total_episodes - 1}, not {unknown}; leave "
            "those out"
        )
    return meta


def _refuse_lance(repo_id: str, root: Path) -> None:
    if any(root.glob("*.lance")) or any((root / "data").glob("**/*.lance")):
        raise DatasetError(
            f"dataset {repo_id!r} at {root} is in the Lance layout (*.lance), which LeRobot 0.6 cannot read: "
            "name the dataset in LeRobot's own layout that it was converted from"
        )


def _refuse_absent_metadata(repo_id: str, root: Path) -> None:
    """Refuse a local v3 dataset that lacks metadata; other folders may be the target of a Hub download."""
    if not any((root / name).is_dir() for name in ("meta", "data", "videos")):
        return
    absent = []
    if not (root / INFO_PATH).is_file():
        absent.append(INFO_PATH)
    elif (info := load_info(root)).codebase_version.startswith("v3"):
        if info.total_tasks > 0 and not (root / DEFAULT_TASKS_PATH).is_file():
            absent.append(DEFAULT_TASKS_PATH)
        if info.total_episodes > 0 and not any((root / EPISODES_DIR).glob("*/*.parquet")):
            absent.append(f"{EPISODES_DIR}/*/*.parquet")
    if absent:
        raise DatasetError(
            f"dataset {repo_id!r} at {root} is not whole: {' and '.join(absent)} is not there. Restore what "
            "is missing"
        )


def open_dataset(config: DatasetSource, tolerance_s: float = 1e-4) -> LeRobotDataset:
    """The dataset, or those episodes of it, frames as uint8.

    Raises:
        UserError: see `open_metadata` and `precompute.dataset.open_whole`.
    """
    return open_whole(open_metadata(config), **_options(config, tolerance_s))


def open_readable_dataset(
    config: DatasetSource, tolerance_s: float = 1e-4
) -> tuple[LeRobotDataset, dict[int, str]]:
    """As `open_dataset`, without episodes whose files are missing; and those episodes, with the reason."""
    return open_readable(open_metadata(config), **_options(config, tolerance_s))


def _options(config: DatasetSource, tolerance_s: float) -> dict[str, Any]:
    options = {**vars(config), "tolerance_s": tolerance_s}
    del options["repo_id"]
    return options
