"""Reject streamed datasets (`--dataset.streaming=true`) that LeRobot 0.6 would deliver wrongly.

LeRobot looks for a streamed frame at `index / fps` in its video file, whatever the dataset says, and its
lookback and lookahead are limited. A policy does not know that its dataset is streamed: it recognises this
from the first such batch, before its step. Problems that a batch does not show (ignored flags,
`num_workers=0`) are described in the guide.
"""

import logging
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import LOOKAHEAD_BACKTRACKTABLE, LOOKBACK_BACKTRACKTABLE
from torch import Tensor

from lerobot_lam_diffusion.utils.errors import TrainingError, raise_problems

logger = logging.getLogger(__name__)


def refuse_wrong_streaming(config: Any, dataset_meta: Any) -> None:
    """Refuse a dataset that is streamed, and that LeRobot streams wrongly.

    Args:
        config: The policy's.
        dataset_meta: `LeRobotDatasetMetadata` of the training dataset.

    Raises:
        TrainingError: LeRobot would deliver other frames than the policy asks for.
    """
    raise_problems(
        f"dataset {dataset_meta.repo_id!r} cannot be streamed for this training (its batch has a float64 "
        "`timestamp`, as streamed ones have; else pass it on as float32)",
        [*_misplaced_videos(dataset_meta), *_long_windows(config)],
        TrainingError,
    )
    logger.warning(
        "The dataset is streamed: LeRobot's StreamingLeRobotDataset delivers all its episodes, whatever "
        "`episodes` says."
    )


def is_streamed(batch: dict[str, Any]) -> bool:
    """Whether a collated batch comes from `StreamingLeRobotDataset`.

    It passes scalars on as Python numbers, which collate to float64; `LeRobotDataset` gives the column's own
    float32. (On Apple's GPUs, which have no float64, LeRobot's pre-processor hides the difference.)
    """
    timestamp = batch.get("timestamp")
    return isinstance(timestamp, Tensor) and timestamp.dtype == torch.float64


def _misplaced_videos(meta: Any) -> list[str]:
    """Cameras whose frames LeRobot's streaming seeks in the wrong place."""
    problems = []
    for camera in meta.video_keys if meta.episodes is not None else ():
        actual = np.asarray(meta.episodes[f"videos/{camera}/from_timestamp"], dtype=np.float64)
        sought = np.asarray(meta.episodes["dataset_from_index"], dtype=np.float64) / meta.fps
        wrong = np.flatnonzero(np.abs(actual - sought) * meta.fps >= 0.5)
        if len(wrong):
            first = wrong[0]
            problems.append(
                f"{camera!r}: LeRobot's streaming seeks every frame at index/fps of its video file, which is "
                f"wrong for {len(wrong)} of {len(actual)} episodes (episode {first} begins at "
                f"{actual[first]:.2f} s of its file, not at {sought[first]:.2f} s: the videos fill several "
                "files, or were cut). It would train on other frames: leave out --dataset.streaming=true"
            )
    return problems


def _long_windows(config: Any) -> list[str]:
    """Windows beyond LeRobot's lookback and lookahead, which it fills with copies of other frames."""
    observations, actions = config.observation_delta_indices, config.action_delta_indices
    reach = [
        (-min(observations), LOOKBACK_BACKTRACKTABLE - 1, "looks {} frames back",
         "a smaller --policy.lam_frame_stride or --policy.n_obs_steps, or precomputed tokens"),
        (max(actions), LOOKAHEAD_BACKTRACKTABLE, "learns actions up to {} frames ahead",
         "a smaller --policy.horizon"),
        (max(observations), LOOKAHEAD_BACKTRACKTABLE, "looks {} frames ahead",
         "smaller --policy.lam_token_offsets, or precomputed tokens"),
    ]  # fmt: skip
    return [
        f"the policy {what.format(frames)}, LeRobot's streaming {at_most} at most: take {remedy}"
        for frames, at_most, what, remedy in reach
        if frames > at_most
    ]
