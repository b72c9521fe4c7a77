"""Dataset → store: the whole extraction, and what it tells at its end."""

import importlib.metadata
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lerobot_lam_diffusion.precompute.encode import PairEncoder
from lerobot_lam_diffusion.precompute.frames import EpisodeFrames
from lerobot_lam_diffusion.precompute.pairs import PairBatch, episode_pairs, rebatch
from lerobot_lam_diffusion.tokens.binding import dataset_digest
from lerobot_lam_diffusion.tokens.provenance import (
    CONTINUOUS,
    VQ,
    DatasetOrigin,
    LamOrigin,
    Provenance,
)
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.writer import codebook_scale, refuse_existing, write_store


@dataclass(frozen=True)
class Summary:
    """What an extraction made.

    Attributes:
        store: The finished store.
        frames, episodes: Covered by it; `missing`: frames without a token, at episode starts.
        code_usage: Per slot, the perplexity of its codes' use (1: one code, K: all alike); VQ only.
        num_bytes: Of the store on disk.
        seconds: Of the extraction.
    """

    store: TokenStore
    frames: int
    episodes: int
    missing: int
    code_usage: list[float]
    num_bytes: int
    seconds: float


def precompute_tokens(
    dataset: Any,
    lam: Any,
    output_dir: Path,
    *,
    camera_key: str,
    lam_path: str,
    frame_stride: int = 1,
    use_vq_tokens: bool = True,
    batch_size: int = 64,
    video_backend: str | None = None,
    show_progress: bool = True,
) -> Summary:
    """Encode every frame pair of a dataset (or of the episodes it was opened with) into a token store.

    Args:
        dataset: `LeRobotDataset`.
        lam: What `load_lam` returns.
        output_dir: Where the store will stand; it appears whole or not at all.
        camera_key: The dataset's camera that the LAM looks at.
        lam_path: How the user named the LAM; recorded.
        frame_stride: Gap of a pair, in frames.
        use_vq_tokens: VQ or continuous tokens.
        batch_size: Pairs at a time; it does not change the tokens.
        video_backend: "torchcodec" or "pyav"; the dataset's own if None.
        show_progress: Draw a progress bar.

    Raises:
        FileExistsError: `output_dir` exists and is not empty.
    """
    refuse_existing(output_dir)
    started = time.perf_counter()
    start, stop, covered = _episode_table(dataset)
    encoder = PairEncoder(lam, batch_size, use_vq_tokens)
    values = encoder.empty_values(int(((stop - start) * covered).sum()))
    with tqdm(total=len(values), unit="frame", desc="LAM tokens", disable=not show_progress) as bar:
        frames = EpisodeFrames(dataset, camera_key, video_backend)
        pairs = _all_pairs(frames, (stop - start).tolist(), covered, frame_stride, bar)
        for batch in rebatch(pairs, batch_size):
            values[batch.rows] = encoder(batch).to(values.dtype)
    provenance = _provenance(dataset, lam, camera_key, lam_path, frame_stride, use_vq_tokens)
    store = write_store(output_dir, provenance, [values], lam.codebook.cpu(), start, stop, covered)
    return _summary(store, values, time.perf_counter() - started)


def _episode_table(dataset: Any) -> tuple[Tensor, Tensor, Tensor]:
    """First frame, end and "is to be covered" of every episode of the dataset."""
    episodes = dataset.meta.episodes
    start = torch.tensor(episodes["dataset_from_index"], dtype=torch.int64)
    stop = torch.tensor(episodes["dataset_to_index"], dtype=torch.int64)
    covered = torch.ones(len(start), dtype=torch.bool)
    if dataset.episodes is not None:
        covered = torch.zeros(len(start), dtype=torch.bool).index_fill(
            0, torch.tensor(dataset.episodes), True
        )
    return start, stop, covered


def _all_pairs(
    frames: EpisodeFrames, lengths: list[int], covered: Tensor, frame_stride: int, bar: tqdm
) -> Iterator[PairBatch]:
    """Pairs of all covered episodes in order; the bar follows the decoded frames."""
    row = 0
    for episode in covered.nonzero().flatten().tolist():
        yield from episode_pairs(_counted(frames.chunks(episode), bar), row, frame_stride)
        row += lengths[episode]


def _counted(chunks: Iterator[Tensor], bar: tqdm) -> Iterator[Tensor]:
    for chunk in chunks:
        yield chunk
        bar.update(len(chunk))


def _provenance(
    dataset: Any, lam: Any, camera_key: str, lam_path: str, frame_stride: int, use_vq_tokens: bool
) -> Provenance:
    meta = dataset.meta
    return Provenance(
        dataset=DatasetOrigin(
            repo_id=meta.repo_id,
            revision=meta.revision,
            total_frames=meta.total_frames,
            total_episodes=meta.total_episodes,
            fps=meta.fps,
            digest=dataset_digest(meta, camera_key),
        ),
        lam=LamOrigin(
            path=lam_path,
            revision=lam.revision,
            fingerprint=lam.fingerprint,
            num_learned_tokens=lam.num_learned_tokens,
            action_latent_dim=lam.action_latent_dim,
            num_codes=lam.num_codes,
            token_scale=codebook_scale(lam.codebook),
        ),
        camera_key=camera_key,
        frame_stride=frame_stride,
        stride_seconds=frame_stride / meta.fps,
        token_kind=VQ if use_vq_tokens else CONTINUOUS,
        dtype=str(lam.dtype).removeprefix("torch."),
        versions={
            name: importlib.metadata.version(name)
            for name in ("lerobot_policy_diffusion_lam", "lerobot", "torch", "safetensors")
        },
    )


def _summary(store: TokenStore, values: Tensor, seconds: float) -> Summary:
    covered = store.episode_row >= 0
    lengths = (store.episode_to - store.episode_from)[covered]
    return Summary(
        store=store,
        frames=len(values),
        episodes=int(covered.sum()),
        missing=int(lengths.clamp(max=store.frame_stride).sum()),
        code_usage=store.code_perplexity(),
        num_bytes=sum(file.stat().st_size for file in store.path.iterdir()),
        seconds=seconds,
    )
