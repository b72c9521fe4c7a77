"""Streamed datasets (`--dataset.streaming=true`): what a policy is trained on rightly, and what it refuses.

LeRobot 0.6 seeks a streamed frame at `index / fps` of its video file, whatever the dataset says, and leaves
several flags of `lerobot-train` aside without a word. A policy is not told that its dataset is streamed. It
finds out from what `lerobot-train` was asked, before the first step, or else from its first batch.
"""

import logging
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draccus import cfgparsing
from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.utils.constants import LOOKAHEAD_BACKTRACKTABLE, LOOKBACK_BACKTRACKTABLE
from lerobot.utils.import_utils import get_safe_default_video_backend
from torch import Tensor

from lerobot_lam_diffusion.problems import UserError, raise_problems

logger = logging.getLogger(__name__)

FLAGS = ("dataset.streaming", "dataset.episodes", "dataset.eval_split", "num_workers")
AUGMENTATION = "dataset.image_transforms.enable"


class StreamingError(UserError):
    """A streamed dataset that LeRobot would deliver otherwise than asked."""

    section = "streaming"


class StreamingGuard:
    """Refuses a streamed dataset that LeRobot would deliver wrongly.

    Args:
        config: The policy's.
        dataset_meta: `LeRobotDatasetMetadata` of the training dataset; None outside training.
        arguments: Of the command line; this process's own if None.

    Raises:
        StreamingError: the command line or its config file streams the dataset, and that would train wrongly;
            all problems at once.
    """

    def __init__(self, config: Any, dataset_meta: Any, arguments: Sequence[str] | None = None) -> None:
        self._is_settled = dataset_meta is None or not config.use_lam_conditioning
        if self._is_settled:
            return
        self._repo_id = dataset_meta.repo_id
        self._problems = [*_misplaced_videos(dataset_meta), *_windows_too_long(config)]
        flags = training_flags(sys.argv[1:] if arguments is None else arguments)
        if flags.get("dataset.streaming") is True:
            self._settle([*self._problems, *_flag_problems(flags, dataset_meta)])

    def check(self, batch: dict[str, Any]) -> None:
        """Look at a training batch.

        Raises:
            StreamingError: it was streamed, and frames of this dataset are not where LeRobot looks for them.
        """
        if self._is_settled or not is_streamed(batch):
            return
        taken = " (its batch has a float64 `timestamp`, as streamed ones have; else hand it on as float32)"
        self._settle(self._problems, taken)
        logger.warning(
            "The dataset is streamed: LeRobot's StreamingLeRobotDataset delivers all its episodes, whatever "
            "`episodes` says."
        )

    def _settle(self, problems: list[str], taken: str = "") -> None:
        raise_problems(
            f"dataset {self._repo_id!r} cannot be streamed for this training{taken}", problems, StreamingError
        )
        self._is_settled = True


def is_streamed(batch: dict[str, Any]) -> bool:
    """Whether a collated batch comes from `StreamingLeRobotDataset`.

    It hands scalars on as Python numbers, which collate to float64; `LeRobotDataset` gives the column's own
    float32. (On Apple's GPUs, which have no float64, LeRobot's pre-processor hides the difference.)
    """
    timestamp = batch.get("timestamp")
    return isinstance(timestamp, Tensor) and timestamp.dtype == torch.float64


def training_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """What a command line, and the config file that it names, say about how the dataset is read.

    LeRobot gives a policy no way to learn it but the one its own configs use.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*FLAGS, AUGMENTATION, "config_path"):
        parser.add_argument(f"--{name}", dest=name, nargs="?")
    told = {k: v for k, v in vars(parser.parse_known_args(list(arguments))[0]).items() if v is not None}
    flags = _file_flags(told.pop("config_path", None))
    return flags | {name: _value(text) for name, text in told.items()}


def _file_flags(path: str | None) -> dict[str, Any]:
    """The same of a config file on this machine, YAML or JSON; of one on the Hub the first batch tells."""
    file = Path(path or "")
    try:
        if file.is_dir():
            file /= TRAIN_CONFIG_NAME
        if path is None or not file.is_file():
            return {}
        document = _value(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # another program's --config_path
        return {}
    found = {}
    for name in (*FLAGS, AUGMENTATION):
        value = document
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found


def _value(text: str) -> Any:
    """A value as LeRobot's own parser reads it."""
    try:
        return cfgparsing.parse_string(text)
    except Exception:  # LeRobot has read it, or will say what is wrong
        return None


def _misplaced_videos(meta: Any) -> list[str]:
    """Cameras whose frames LeRobot's streaming would seek in the wrong place."""
    problems = []
    for camera in meta.video_keys if meta.episodes is not None else ():
        there = np.asarray(meta.episodes[f"videos/{camera}/from_timestamp"], dtype=np.float64)
        sought = np.asarray(meta.episodes["dataset_from_index"], dtype=np.float64) / meta.fps
        wrong = np.flatnonzero(np.abs(there - sought) * meta.fps >= 0.5)
        if len(wrong):
            first = wrong[0]
            problems.append(
                f"{camera!r}: LeRobot's streaming seeks every frame at index/fps of its video file, which is "
                f"wrong for {len(wrong)} of {len(there)} episodes (episode {first} begins at "
                f"{there[first]:.2f} s of its file, not at {sought[first]:.2f} s: the videos fill several "
                "files, or were cut). It would train on other frames: leave out --dataset.streaming=true"
            )
    return problems


def _windows_too_long(config: Any) -> list[str]:
    """Windows that LeRobot's streaming fills up with copies of other frames than map-style datasets do."""
    problems = []
    back = -min(config.observation_delta_indices)
    if back >= LOOKBACK_BACKTRACKTABLE:
        problems.append(
            f"the policy looks {back} frames back, LeRobot's streaming {LOOKBACK_BACKTRACKTABLE - 1} at "
            "most: take a smaller --policy.lam_frame_stride or --policy.n_obs_steps, or precomputed tokens"
        )
    ahead = max(config.action_delta_indices)
    if ahead > LOOKAHEAD_BACKTRACKTABLE:
        problems.append(
            f"the policy learns actions up to {ahead} frames ahead, LeRobot's streaming looks "
            f"{LOOKAHEAD_BACKTRACKTABLE} ahead at most: take a smaller --policy.horizon"
        )
    seen_ahead = max(config.observation_delta_indices)
    if seen_ahead > LOOKAHEAD_BACKTRACKTABLE:
        problems.append(
            f"the LAM looks {seen_ahead} frames ahead, LeRobot's streaming {LOOKAHEAD_BACKTRACKTABLE} at "
            "most: take smaller --policy.lam_token_offsets, or precomputed tokens"
        )
    return problems


def _flag_problems(flags: dict[str, Any], meta: Any) -> list[str]:
    """What LeRobot's streaming makes of the other flags, where it is not what they say."""
    problems = []
    episodes = flags.get("dataset.episodes")
    if isinstance(episodes, list) and len(set(episodes)) < meta.total_episodes:
        problems.append(
            f"--dataset.episodes names {len(episodes)} episodes, LeRobot's streaming ignores it and would "
            f"train on all {meta.total_episodes}: leave out one of the two flags, or stream a dataset of "
            "those episodes (lerobot-edit-dataset)"
        )
    if flags.get("dataset.eval_split"):
        problems.append(
            "with --dataset.eval_split LeRobot does not stream, and reads the frames in order instead of "
            "shuffling them: leave out one of the two flags"
        )
    if flags.get("num_workers") == 0:
        problems.append("with --num_workers=0 LeRobot streams nothing, for ever: pass --num_workers=1")
    images = [key for key in meta.camera_keys if key not in meta.video_keys]
    if flags.get(AUGMENTATION) is True and images:
        problems.append(
            f"LeRobot's streaming does not apply --{AUGMENTATION}=true to {images}, which are kept as "
            "images: leave out one of the two flags"
        )
    if set(meta.video_keys) - set(meta.depth_keys) and get_safe_default_video_backend() != "torchcodec":
        problems.append(
            "LeRobot's streaming decodes with torchcodec alone, which cannot be loaded here: it needs "
            "FFmpeg's shared libraries (apt-get install ffmpeg, or conda install -c conda-forge ffmpeg), and "
            "pip install torchcodec where that is missing"
        )
    return problems
