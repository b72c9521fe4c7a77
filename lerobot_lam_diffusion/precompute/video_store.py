"""Demonstration videos → a token store whose episodes they are, in order."""

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lerobot_lam_diffusion.precompute.dataset import codebook_of, describe_tokens
from lerobot_lam_diffusion.precompute.demonstrations import (
    PAIRS_AT_A_TIME,
    DemonstrationVideo,
    encode_video,
)
from lerobot_lam_diffusion.tokens.provenance import VIDEOS, DatasetInfo
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.writer import write_store

VIDEO_CAMERA = "video"


def precompute_videos(
    videos: Sequence[DemonstrationVideo],
    lam: Any,
    output_dir: Path,
    *,
    fps: float,
    camera_key: str = VIDEO_CAMERA,
    lam_path: str,
    frame_stride: int = 1,
    use_vq_tokens: bool = True,
    storage_dtype: str = "",
    batch_size: int = PAIRS_AT_A_TIME,
    show_progress: bool = True,
) -> TokenStore:
    """Encode all frame pairs of videos; episode k of the store guides a policy as the k-th video would.

    The tokens of all of them are in memory until the store is written (a VQ token takes `n` bytes), frames
    only a chunk at a time.

    Args:
        fps: Frames per second of the tokens, to which each video is resampled.
        camera_key: What to call the camera; recorded.
        batch_size: Pairs per batch; a value other than guidance's changes continuous tokens by rounding.

    Raises:
        DatasetError: a video cannot be read, or has no pair of frames; nothing is written then.
        FileExistsError: something exists at `output_dir` already.
    """
    blocks: list[Tensor] = []
    lengths: list[int] = []
    with tqdm(unit="frame", desc="LAM tokens", disable=not show_progress) as bar:
        for video in videos:
            values, frames = encode_video(
                video, lam, fps, frame_stride, use_vq_tokens, batch_size, bar.update
            )
            if use_vq_tokens:
                values = values.to(torch.int16 if lam.num_codes <= 1 << 15 else torch.int32)
            missing = values.new_zeros(frame_stride, values.shape[1])
            blocks.append(torch.cat([missing, values]))
            lengths.append(frames)
    ends = torch.tensor(list(accumulate(lengths)))
    digest = hashlib.sha256(f"{fps!r}".encode())
    for video in videos:
        digest.update(video.digest().encode())
    named = videos[0].path.stem if len(videos) == 1 else videos[0].path.resolve().parent.name
    dataset = DatasetInfo(
        repo_id=f"{VIDEOS}{named}",
        revision=None,
        total_frames=sum(lengths),
        total_episodes=len(lengths),
        fps=fps,
        digest=digest.hexdigest(),
    )
    provenance = describe_tokens(
        dataset,
        lam,
        camera_key=camera_key,
        lam_path=lam_path,
        frame_stride=frame_stride,
        use_vq_tokens=use_vq_tokens,
        storage_dtype=storage_dtype,
        decoder="pyav",
    )
    covered = torch.ones(len(lengths), dtype=torch.bool)
    return write_store(
        output_dir, provenance, blocks, codebook_of(lam), ends - torch.tensor(lengths), ends, covered
    )
