r"""Precompute the LAM tokens of a LeRobot dataset.

    lerobot-lam-precompute --dataset.repo_id=lerobot/pusht --lam.path=microsoft/villa-x \
        --camera_key=observation.image --output_dir=./data/pusht_lam

A YAML file can hold the flags (`--config_path=precompute.yaml`); `--dataset-repo-id`, `--lam-model-path`,
`--camera-key`, `--output-dir`, `--batch-size`, `--no-vq-tokens` and `--episodes 0 1 2` are understood too.

A run that was stopped, by whatever, goes on when the same command is run again. Several GPUs, machines, or
the tasks of a SLURM array share the work:

    torchrun --nproc_per_node=8 -m lerobot_lam_diffusion.scripts.precompute_lam_tokens …
    lerobot-lam-precompute … --shard_index=$SLURM_ARRAY_TASK_ID --num_shards=32

Or an engine starts the tasks, records what is finished and merges (SLURM, Ray, processes of this machine):

    lerobot-lam-precompute … --cluster.engine=slurm --cluster.tasks=64 --cluster.partition=gpu \
        --cluster.time=04:00:00

Videos become a store whose episodes they are; each then guides a policy as the video itself would:

    lerobot-lam-precompute --videos=demos --fps=10 --lam.path=microsoft/villa-x --output_dir=demos_lam
    lerobot-eval --policy.path=… '--policy.lam_guidance=demos_lam#0' …
"""

import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import draccus
import torch
from lerobot.utils.import_utils import get_safe_default_video_backend

import lerobot_lam_commands
from lerobot_lam_diffusion.lam import proposed_stride, read_config, recorded_path, resolve_lam
from lerobot_lam_diffusion.precompute.cluster_config import ClusterConfig
from lerobot_lam_diffusion.precompute.dataset import check_kind
from lerobot_lam_diffusion.precompute.demonstrations import (
    PAIRS_AT_A_TIME,
    VIDEO_CAMERA,
    precompute_videos,
    videos_in,
)
from lerobot_lam_diffusion.precompute.engine import Summary, precompute_tokens, resume_hint
from lerobot_lam_diffusion.precompute.frames import DecodeError, choose_camera
from lerobot_lam_diffusion.precompute.processes import Process, usable_cores
from lerobot_lam_diffusion.scripts.command_line import (
    Command,
    DatasetSource,
    LamFlags,
    counted,
    run_command,
    usable_device,
)
from lerobot_lam_diffusion.scripts.inputs import (
    open_dataset,
    open_metadata,
    open_readable_dataset,
)
from lerobot_lam_diffusion.scripts.next_step import follow, next_step, train_on
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS_STORAGE
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import ExtractionError, first_line, raise_problems
from lerobot_lam_diffusion.utils.files import refuse_existing

_NOT_FOR_VIDEOS = (
    "num_workers",
    "tolerance_s",
    "on_error",
    "extend",
    "shard_frames",
    "shard_index",
    "num_shards",
)


@dataclass(kw_only=True)
class PrecomputeConfig:
    """Dataset, or videos → token store.

    Args:
        dataset: As in lerobot-train; `--dataset.episodes=[0,1]` extracts those only.
        lam: Which LAM.
        output_dir: Where the store will stand.
        cluster: Extraction by the tasks of an engine that a cluster runs, through datatrove.
        camera_key: The dataset's camera that the LAM looks at; may be left out if there is only one.

    Videos instead of a dataset:
        videos: A video, a part of it in seconds (`demo.mp4#t=1.5,9`), or a folder of videos in order.
        fps: Frames per second of their tokens: that of the dataset which the policy is trained on.

    Tokens:
        frame_stride: Offset between the frames of a pair, in frames; if left out, that on which the LAM was
            trained where it says so (LAPA 0.6 s, UniVLA 0.9 s), else 1.
        use_vq_tokens: Codebook rows (true) or the vectors before quantisation (false); if left out, true
            where the LAM has a codebook.
        dtype: Compute dtype of the encoder, float32 or bfloat16; the quantiser is always float32.
        storage_dtype: How continuous tokens are kept: float32, float16, bfloat16 or int8.

    Speed and memory:
        batch_size: Frame pairs at a time; found out if left out. It does not change float32 VQ tokens.
        num_workers: Threads that decode; as many as cores, 16 at most, if left out.
        compile: Compile the encoder: a minute at the start, pays over some 100,000 frames.
        device: cuda, mps, cpu; the best there is if left out.

    Episodes that cannot be read:
        tolerance_s: As in lerobot-train: how far a frame may lie from its timestamp, in seconds.
        on_error: What to do with an episode that cannot be read: "fail", or "skip" and record it as missing.

    Going on and many processes:
        extend: Token store of an earlier version of the dataset: episodes whose frames are the very same are
            copied from it, the others encoded.
        shard_frames: Frames of a shard at least; what is lost by a crash. 1/256 of all if left out.
        shard_index: Which task of a job array this is, from 0.
        num_shards: How many tasks the job array has.
    """

    # Not `DatasetSource | None`: draccus would not say which of its fields is wrong.
    dataset: DatasetSource = field(default_factory=lambda: DatasetSource(repo_id=""))
    lam: LamFlags
    output_dir: Path
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    camera_key: str | None = None
    videos: str | None = None
    fps: float | None = None
    frame_stride: int | None = None
    use_vq_tokens: bool | None = None
    dtype: str = "float32"
    storage_dtype: str = "float32"
    batch_size: int | None = None
    num_workers: int | None = None
    compile: bool = False
    device: str | None = None
    tolerance_s: float = 1e-4
    on_error: str = "fail"
    extend: str | None = None
    shard_frames: int | None = None
    shard_index: int = 0
    num_shards: int = 1

    def __post_init__(self) -> None:
        problems = []
        if self.frame_stride is not None and self.frame_stride < 1:
            problems.append(f"--frame_stride={self.frame_stride} must be at least 1")
        for name, least in (("batch_size", 1), ("num_workers", 0), ("shard_frames", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"--{name}={value} must be at least {least}")
        if not 0 <= self.shard_index < self.num_shards:
            problems.append(
                f"--shard_index={self.shard_index} must be one of 0 to num_shards - 1 ({self.num_shards - 1})"
            )
        if self.on_error not in ("fail", "skip"):
            problems.append(f"--on_error={self.on_error} must be fail or skip")
        if self.storage_dtype not in CONTINUOUS_STORAGE:
            problems.append(
                f"--storage_dtype={self.storage_dtype} must be one of {', '.join(CONTINUOUS_STORAGE)}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            problems.append(f"--dtype={self.dtype} must be float32 or bfloat16")
        problems += self.cluster.problems(self.device, (self.shard_index, self.num_shards) != (0, 1))
        problems += self.dataset.problems() if self.has_dataset else self._video_problems()
        if self.has_dataset and self.videos is not None:
            problems.append("--dataset.repo_id and --videos are two sources of frames; leave one out")
        elif self.has_dataset and self.fps is not None:
            problems.append(f"--fps={self.fps:g} is for --videos; a dataset has its own, leave it out")
        raise_problems("these flags do not work", problems)

    @property
    def has_dataset(self) -> bool:
        """Whether a dataset is named, and not videos."""
        return bool(self.dataset.repo_id)

    def _video_problems(self) -> list[str]:
        if self.videos is None:
            return [
                "--dataset-repo-id or --dataset.repo_id is missing: the dataset, or --videos=<file or folder>"
            ]
        problems = []
        if self.fps is None or not 0 < self.fps < math.inf:
            what = " is missing" if self.fps is None else f"={self.fps:g} must be a positive number"
            problems.append(f"--fps{what}: how many frames per second the policy's dataset has")
        given = [name for name in _NOT_FOR_VIDEOS if getattr(self, name) != getattr(PrecomputeConfig, name)]
        if self.cluster.engine is not None:
            given.append("cluster.engine")
        return problems + [f"--{name} is not for --videos; leave it out" for name in given]


COMMAND = Command("lerobot-lam-precompute", PrecomputeConfig, __doc__)


def precompute(config: PrecomputeConfig) -> None:
    """Check everything that can be checked quickly, then extract, then say what was made."""
    if not config.has_dataset:
        print(_precompute_videos(config))
    elif config.cluster.engine is not None:
        _by_cluster(config)
    else:
        print(report(_extract(config), config))


def _extract(
    config: PrecomputeConfig, process: Process | None = None, merge: bool = True, show_progress: bool = True
) -> Summary:
    output_dir, unreadable = config.output_dir, dict[int, str]()
    if not (output_dir / PROVENANCE_FILE).is_file():  # a finished store is compared once all inputs are known
        refuse_existing(output_dir)
    device = usable_device(config.device)
    kind = _kind_of_tokens(config)
    process = process or Process.launched(device, config.shard_index, config.num_shards)
    if config.on_error == "skip":
        dataset, unreadable = open_readable_dataset(config.dataset, config.tolerance_s)
    else:
        dataset = open_dataset(config.dataset, config.tolerance_s)
    if device == "cuda" and process.world_size > 1:
        device = f"cuda:{process.local_rank}"
    lam = config.lam.load(device, config.dtype)
    try:
        with _out_of_memory_explained():
            return precompute_tokens(
                dataset,
                lam,
                output_dir,
                **kind,
                batch_size=config.batch_size,
                num_workers=config.num_workers,
                compile=config.compile,
                shard_frames=config.shard_frames,
                skip_unreadable=config.on_error == "skip",
                unreadable=unreadable,
                process=process,
                extend=[] if config.extend is None else [TokenStore.open(config.extend)],
                merge=merge,
                show_progress=show_progress,
            )
    except (KeyboardInterrupt, DecodeError, OSError) as error:
        hint = None if isinstance(error, FileExistsError) else resume_hint(output_dir)
        if hint:
            print(f"Stopped. {hint}.", file=sys.stderr)
        if isinstance(error, DecodeError):
            raise DecodeError(
                f"{error}, or pass --on_error=skip to record such episodes as missing"
            ) from error
        raise


def _kind_of_tokens(config: PrecomputeConfig) -> dict[str, Any]:
    """What the tokens will be, as arguments of an extraction; checked before frames or weights are read.

    The LAM decides about stride and codebook where the user does not.
    """
    lam = read_config(resolve_lam(config.lam.path, config.lam.revision))
    if config.has_dataset:
        metadata = open_metadata(config.dataset)
        camera_key, fps = choose_camera(metadata, config.camera_key), float(metadata.fps)
    else:
        assert config.fps is not None
        camera_key, fps = config.camera_key or VIDEO_CAMERA, config.fps
    use_vq_tokens = lam.num_codes > 0 if config.use_vq_tokens is None else config.use_vq_tokens
    check_kind(lam.num_codes, config.lam.path, use_vq_tokens)
    if use_vq_tokens and config.storage_dtype != "float32":
        raise ExtractionError(
            f"--storage_dtype={config.storage_dtype} is for continuous tokens (--use_vq_tokens=false); VQ "
            "tokens are kept as code indices, exactly"
        )
    stride = config.frame_stride
    if stride is None and (stride := proposed_stride([lam], fps)):  # it decides what the tokens mean
        print(
            f"--frame_stride={stride} is taken: the LAM was trained on pairs {lam.stride_seconds:g} s apart, "
            f"which is {counted(stride, 'frame')} at {fps:g} fps."
        )
    return {
        "camera_key": camera_key,
        "lam_path": recorded_path(config.lam.path),
        "frame_stride": stride or 1,
        "use_vq_tokens": use_vq_tokens,
        "storage_dtype": config.storage_dtype,
    }


@contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ExtractionError(
            f"the GPU has too little memory ({first_line(error)}); pass a smaller --batch_size"
        ) from error


def _by_cluster(config: PrecomputeConfig) -> None:
    """Check what this machine can check, then have the tasks of an engine extract."""
    output_dir = config.output_dir.absolute()
    if (output_dir / PROVENANCE_FILE).is_file():
        raise ExtractionError(
            f"{output_dir} holds a finished token store, so nothing was submitted; lerobot-lam-tokens info "
            "tells what it holds. Choose another --output_dir, or remove it to extract again"
        )
    refuse_existing(output_dir)
    kind = _kind_of_tokens(config)
    needed = ("datatrove", "ray") if config.cluster.engine == "ray" else ("datatrove",)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ExtractionError(
            f"--cluster.engine={config.cluster.engine} needs {' and '.join(missing)}, not installed here: "
            f"pip install {' '.join(missing)}"
        )
    from lerobot_lam_diffusion.precompute.cluster import submit

    message = submit(config.cluster, extract_share, _flags_of_a_task(config, kind), output_dir)
    print(message or report(Summary(TokenStore.open(output_dir)), config))


def _flags_of_a_task(config: PrecomputeConfig, kind: dict[str, Any]) -> dict[str, Any]:
    """Names, paths and numbers for `extract_share`; tasks run in other folders, so paths are absolute."""
    flags = draccus.encode(config)
    del flags["cluster"]
    flags["camera_key"] = kind["camera_key"]
    flags["output_dir"] = str(config.output_dir.absolute())
    flags["lam"]["path"] = kind["lam_path"]
    if config.extend is not None:
        store = TokenStore.open(config.extend)
        flags["extend"] = store.hub_id or str(store.path.absolute())
    # Decoders may differ by one pixel level, so all tasks use the decoder chosen on this machine.
    flags["dataset"]["video_backend"] = config.dataset.video_backend or get_safe_default_video_backend()
    if config.dataset.root is not None:
        flags["dataset"]["root"] = str(Path(config.dataset.root).absolute())
    if config.cluster.engine == "local":
        flags["device"] = usable_device(config.device)
    elif config.cluster.gpus_per_task == 0:
        flags["device"] = config.device or "cpu"
    else:
        flags["device"] = config.device or "cuda"  # a broken GPU fails its task, so no CPU tokens mix in
    return flags


def extract_share(flags: dict[str, Any], cpus: int, data: Any, rank: int, world_size: int) -> None:
    """Extract the share of task `rank` of `world_size` on `cpus` cores, without merging."""
    config = draccus.decode(PrecomputeConfig, flags)
    process = Process(local_size=max(1, usable_cores() // cpus), shard_index=rank, num_shards=world_size)
    _extract(config, process, merge=False, show_progress=False)


def _precompute_videos(config: PrecomputeConfig) -> str:
    """Write the videos' store, and return the text that reports it."""
    assert config.videos is not None
    assert config.fps is not None
    refuse_existing(config.output_dir)
    device, videos = usable_device(config.device), videos_in(config.videos)
    kind = _kind_of_tokens(config)
    lam = config.lam.load(device, config.dtype)
    if config.compile:
        lam.compile()
    with _out_of_memory_explained():
        store = precompute_videos(
            videos,
            lam,
            config.output_dir,
            **kind,
            fps=config.fps,
            batch_size=config.batch_size or PAIRS_AT_A_TIME,
        )
    lengths = (store.episode_to - store.episode_from).tolist()
    lines = [
        f"frames    {sum(lengths)} at {config.fps:g} fps in {counted(len(lengths), 'video')}",
        f"tokens    {store.kind}, {store.token_dim} values a frame",
        f"store     {store.path.resolve()}",
    ]
    for number, (length, video) in enumerate(zip(lengths, videos, strict=True)):
        lines.append(f"#{number:<8} {length / config.fps:6.1f} s  {video.name}")
    lines.append(
        next_step(follow(store.path.resolve()), "Follow one of them (or lerobot-rollout, on a robot)")
    )
    return "\n".join(lines)


def report(summary: Summary, config: PrecomputeConfig) -> str:
    """The closing lines: what was made, where it lies, what to run next."""
    store = summary.store
    if store is None:
        return (
            f"This process is done: {summary.encoded} tokens. {summary.shards_finished} of "
            f"{summary.shards_total} shards are finished; the process that finishes the last one merges "
            "them.\nIf the others have stopped, the same command without --shard_index and --num_shards "
            "makes the rest."
        )
    assert store.provenance is not None
    lines = [f"frames    {len(store.values):,} in {counted(len(store.covered_episodes), 'episode')}"]
    if summary.copied:
        lines.append(f"extended  {counted(summary.copied, 'episode')} copied from {config.extend}")
    lines += [
        f"missing   {counted(len(store.values) - store.num_tokens, 'token')}: no pair ends in the first "
        f"{counted(store.frame_stride, 'frame')} of an episode",
        f"tokens    {store.kind}, {store.token_dim} values a frame, camera {store.provenance.camera_key}",
    ]
    if usage := ", ".join(f"{perplexity:.1f}" for perplexity in store.code_perplexity()):
        lines.append(f"codebook  perplexity {usage} of {store.provenance.lam.num_codes} codes a slot")
    if config.cluster.engine is None:
        lines.append(f"time      {_time(summary)}")
    lines += [
        f"size      {sum(file.stat().st_size for file in store.path.iterdir()):,} bytes",
        f"store     {store.path.resolve()}",
        *(f"SKIPPED   episode {episode}: {reason}" for episode, reason in store.skipped.items()),
    ]
    training = train_on(store, store.path.resolve(), config.dataset.repo_id, config.dataset.root)
    return "\n".join([*lines, next_step(training, "Train on it", store.provenance.dataset.fps)])


def _time(summary: Summary) -> str:
    """How fast it was, and what it waited for."""
    if not summary.encoded:
        return "0 s: all of it was there already; nothing was extracted"
    return (
        f"{summary.seconds:.1f} s, {summary.encoded / summary.seconds:.0f} pairs/s in batches of "
        f"{summary.batch_size}; {summary.waited / summary.seconds:.0%} of it waiting for frames"
    )


def main(argv: Sequence[str] | None = None) -> None:
    # Job schedulers send SIGTERM; it interrupts as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_command(COMMAND, precompute, argv)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    lerobot_lam_commands.precompute()
