"""Fit a compact LAM of the villa-X architecture to the frames of a LeRobot dataset.

    lerobot-lam-fit --dataset.repo_id=lerobot/pusht --camera_key=observation.image --output_dir=./data/my_lam

writes a folder that every `--lam.path` takes, with a card of held-out figures. A YAML file can hold the flags
(`--config_path=configs/fit_pusht_compact.yaml`); an interrupted fit continues with `--resume=true`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor
from tqdm import tqdm

import lerobot_lam_commands
from lerobot_lam_diffusion.lam import LamConfig, load_lam, read_config, resolve_lam, save_lam
from lerobot_lam_diffusion.lam.fit.data import FitData
from lerobot_lam_diffusion.lam.fit.recipe import FLOW_TERM, PRESETS, FitRecipe
from lerobot_lam_diffusion.lam.fit.refine import REFINE_CHECKPOINT_FILE, DecoderRefinement, copying_decoder
from lerobot_lam_diffusion.lam.fit.report import FitReport, evaluate, write_card
from lerobot_lam_diffusion.lam.fit.trainer import CHECKPOINT_FILE, Fit
from lerobot_lam_diffusion.lam.loading import open_weights
from lerobot_lam_diffusion.lam.resize import bilinear
from lerobot_lam_diffusion.lam.villa_x import VillaXLam
from lerobot_lam_diffusion.precompute.frames import EpisodeFrames, choose_camera
from lerobot_lam_diffusion.precompute.rows import rows_of, vectors_of
from lerobot_lam_diffusion.scripts.command_line import Command, DatasetSource, run_command, usable_device
from lerobot_lam_diffusion.scripts.inputs import open_dataset, open_metadata
from lerobot_lam_diffusion.scripts.next_step import dataset_flags, next_step
from lerobot_lam_diffusion.tokens.binding import dataset_digest
from lerobot_lam_diffusion.utils.errors import UserError, raise_problems
from lerobot_lam_diffusion.utils.files import remove_partial, whole_or_nothing

STATE_KEY = "observation.state"
FRAMES_FILE = "fit_frames.npy"


@dataclass
class FitLamConfig:
    """Frames of a dataset → a LAM of one's own.

    Args:
        dataset: As in lerobot-train; `--dataset.episodes=[0,1]` uses those only.
        output_dir: Where the LAM will stand.
        camera_key: The dataset's camera that the LAM looks at; may be left out if there is only one.
        frame_stride: Gap of a frame pair, in frames.
        holdout_episodes: How many of the last episodes only measure the LAM; if left out a
            tenth, at least 5 and at most half.
        tolerance_s: As in lerobot-train: how far a frame may lie from its timestamp, in seconds.

    The fit:
        preset: Size of the model: compact (0.6 M parameters, for a CPU), small (5.8 M, for a GPU) or tiny
            (for tests).
        steps: Optimiser steps in all.
        batch_size: Frame pairs a step.
        seed: Of weights, batches and noise.
        learning_rate: Peak of the learning rate.
        state_weight: Weight of the loss that ties tokens to changes of `observation.state`. If 0, or if
            there is no state that changes, tokens are tied to the optical flow instead: pixels only.
        device: cuda, mps, cpu; the best there is if left out.

    A LAM that there is:
        refine_decoder: Folder, shipped name or Hub id of a LAM: only its FDM is fitted further, to predict
            frames better than copying does on all pixels and on the moving ones. Its tokens and its
            fingerprint stay; `preset` and `state_weight` have no meaning then. A learning rate of 3e-4 is
            a good start.
        decoder_width: Begin with a new FDM of this width, which copies frames; if left out, the LAM's own
            goes on. The wider, the more detail of still pixels survives.
        decoder_depth: Blocks of the new FDM.

    Going on:
        resume: Continue the fit that `output_dir` holds.
        save_every: Steps between checkpoints.
    """

    dataset: DatasetSource
    output_dir: Path
    camera_key: str | None = None
    preset: str = "compact"
    steps: int = 3000
    batch_size: int = 64
    seed: int = 0
    learning_rate: float = 1e-3
    state_weight: float = 1.0
    frame_stride: int = 1
    holdout_episodes: int | None = None
    device: str | None = None
    refine_decoder: str | None = None
    decoder_width: int | None = None
    decoder_depth: int = 3
    resume: bool = False
    save_every: int = 200
    tolerance_s: float = 1e-4

    def __post_init__(self) -> None:
        problems = []
        if self.preset not in PRESETS:
            problems.append(f"--preset={self.preset} is unknown, choose one of {', '.join(PRESETS)}")
        least = {"steps": 1, "batch_size": 2, "frame_stride": 1, "save_every": 1, "state_weight": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                problems.append(f"--{name}={getattr(self, name)} must be at least {value}")
        if self.decoder_width is not None:
            if self.refine_decoder is None:
                problems.append(f"--decoder_width={self.decoder_width} needs --refine_decoder: whose FDM?")
            if self.decoder_width < 64 or self.decoder_width % 8 or self.decoder_depth < 1:
                problems.append(
                    f"--decoder_width={self.decoder_width} --decoder_depth={self.decoder_depth} is no valid "
                    "size, expected a width of at least 64, a multiple of 8, and a depth of at least 1"
                )
        if self.learning_rate <= 0:
            problems.append(f"--learning_rate={self.learning_rate} must be positive")
        if self.holdout_episodes is not None and self.holdout_episodes < 1:
            problems.append(f"--holdout_episodes={self.holdout_episodes} must be at least 1")
        raise_problems("cannot fit a LAM so", problems)


COMMAND = Command("lerobot-lam-fit", FitLamConfig, __doc__)


def fit_lam(config: FitLamConfig) -> None:
    """Load the frames, fit, measure on held-out episodes, write the model folder and its card."""
    _check_output(config)
    device = usable_device(config.device)
    camera = choose_camera(open_metadata(config.dataset), config.camera_key)
    refined = None if config.refine_decoder is None else _open_refined(config.refine_decoder, device)
    model_config = PRESETS[config.preset] if refined is None else refined.config
    dataset = open_dataset(config.dataset, config.tolerance_s)
    data = _load_data(dataset, camera, model_config.resolution, config)
    print(
        f"Fitting to {dataset.num_episodes - data.holdout_episodes} episodes; "
        f"the last {data.holdout_episodes} measure the LAM."
    )
    names = ("steps", "batch_size", "seed", "learning_rate", "state_weight")
    recipe = FitRecipe(**{name: getattr(config, name) for name in names})
    training: Fit | DecoderRefinement
    if refined is None:
        training = Fit(model_config, recipe, data, device)
        print(f"The LAM's tokens are tied to {_tied_to(training)}.")
        about = (
            f"{config.preset} LAM of {config.dataset.repo_id} ({camera}), frame stride {data.frame_stride}"
        )
    else:
        if config.decoder_width is not None:
            refined = copying_decoder(refined, data, config.decoder_width, config.decoder_depth, config.seed)
        training = DecoderRefinement(refined, recipe, data)
        about = f"{config.refine_decoder}, FDM refined on {config.dataset.repo_id}"
    if config.resume:
        training.resume(config.output_dir)
    training.run(config.output_dir, config.save_every)

    made = training.model if isinstance(training, Fit) else training.lam
    save_lam(
        config.output_dir,
        made.config,
        made.encoder,
        made.vq,
        made.decoder,
        description=about,
        version=1,
        fdm_dtype=torch.float32 if refined is None else torch.float16,
    )
    lam = load_lam(config.output_dir, device=device, fdm=True)
    report = evaluate(lam, data)
    write_card(config.output_dir, lam, report, _facts(config, dataset, camera, training))
    for leftover in (CHECKPOINT_FILE, REFINE_CHECKPOINT_FILE, FRAMES_FILE):
        (config.output_dir / leftover).unlink(missing_ok=True)
    _tell(config, camera, report)


def _open_refined(path: str, device: str) -> VillaXLam:
    """The LAM to refine: one whose FDM predicts pixels, and which `save_lam` writes back bit for bit."""
    folder = resolve_lam(path)
    config = read_config(folder)
    if not isinstance(config, LamConfig) or config.in_channels != 3:
        raise UserError(
            f"--refine_decoder={path} has no FDM of villa-X's architecture that predicts RGB frames, "
            "expected one to refine: name a LAM that lerobot-lam-fit wrote"
        )
    with open_weights(folder) as weights:
        keys = weights.keys()
        dtypes = {weights.get_tensor(key).dtype for key in keys if key.startswith(("encoder.", "vq."))}
    if dtypes != {torch.float32}:
        raise UserError(
            f"--refine_decoder={path} is not stored in float32, so its fingerprint would change, expected "
            "float32 weights: refine a LAM that lerobot-lam-fit wrote"
        )
    lam = load_lam(path, device=device, fdm=True)
    assert isinstance(lam, VillaXLam)
    return lam


def _check_output(config: FitLamConfig) -> None:
    folder = config.output_dir
    checkpoint = folder / (CHECKPOINT_FILE if config.refine_decoder is None else REFINE_CHECKPOINT_FILE)
    if config.resume and not checkpoint.is_file():
        raise UserError(f"--resume=true found no {checkpoint}, expected a checkpoint: start without --resume")
    if config.resume or not folder.exists():
        return
    # A fit that was stopped before its first checkpoint leaves frames alone, which are decoded again.
    if not folder.is_dir() or any(FRAMES_FILE not in file.name for file in folder.iterdir()):
        raise UserError(
            f"--output_dir={folder} exists and is not empty, expected a new folder: choose another one, or "
            "continue an interrupted fit with --resume=true"
        )


def _load_data(dataset: LeRobotDataset, camera: str, resolution: int, config: FitLamConfig) -> FitData:
    episodes = torch.from_numpy(vectors_of(dataset, "episode_index")[:, 0]).long()
    source = f"{camera}, episodes {dataset.episodes}, {dataset_digest(dataset.meta, camera)}"
    holdout = config.holdout_episodes
    if holdout is None:
        holdout = min(max(5, dataset.num_episodes // 10), dataset.num_episodes // 2)
    nothing = torch.empty(0, 3, resolution, resolution, dtype=torch.uint8)
    # Built without frames first, so that its checks run before decoding.
    has_states = STATE_KEY in rows_of(dataset).column_names
    states = torch.from_numpy(vectors_of(dataset, STATE_KEY)).float() if has_states else None
    data = FitData(nothing, episodes, states, config.frame_stride, holdout, source)
    reader = EpisodeFrames(dataset, camera)
    reader.check(episodes.unique_consecutive().tolist())
    config.output_dir.mkdir(parents=True, exist_ok=True)
    path = config.output_dir / FRAMES_FILE
    if not config.resume:
        path.unlink(missing_ok=True)
        remove_partial(path)
    return replace(data, frames=_frames(reader, episodes, resolution, path))


def _frames(source: EpisodeFrames, episodes: Tensor, resolution: int, path: Path) -> Tensor:
    """All frames at the model's resolution, uint8 (F, 3, R, R), decoded once into a file beside the model."""
    shape = (len(episodes), 3, resolution, resolution)
    if not path.exists():
        with whole_or_nothing(path) as partial, partial.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for episode in tqdm(episodes.unique_consecutive().tolist(), desc="decode", unit="episode"):
                for chunk in source.chunks(episode):
                    file.write(bilinear(chunk, resolution).contiguous().numpy().data)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _tied_to(fit: Fit) -> str:
    head = fit.model.change_head
    assert head is not None
    what = "the optical flow of the pixels" if head.term == FLOW_TERM else f"changes of `{STATE_KEY}`"
    return f"{what}, with weight {head.weight:g}"


def _facts(
    config: FitLamConfig, dataset: LeRobotDataset, camera: str, training: Fit | DecoderRefinement
) -> dict[str, str]:
    stride = config.frame_stride
    return {
        "dataset": f"`{config.dataset.repo_id}`",
        "episodes, frames": f"{dataset.num_episodes}, {dataset.num_frames}",
        "camera": f"`{camera}`",
        "frame stride": f"{stride} ({stride / dataset.fps:.3g} s at {dataset.fps} fps)",
        "held out": f"the last {training.data.holdout_episodes} episodes",
        **(
            {"preset": f"`{config.preset}`", "tokens tied to": _tied_to(training)}
            if isinstance(training, Fit)
            else {"FDM refined; encoder and codebook of": f"`{config.refine_decoder}`"}
        ),
        "steps": f"{config.steps} of {config.batch_size} pairs, seed {config.seed}",
        "learning rate": f"{config.learning_rate:g}",
    }


def _tell(config: FitLamConfig, camera: str, report: FitReport) -> None:
    print("\n".join(report.lines()))
    if min(report.perplexity) < 2 or (report.probe is not None and report.probe.token < 0.2):
        print(
            "\nIts tokens say little so far: fit it again, into another --output_dir, with more --steps, "
            "more frames or another stride."
        )
    command = [
        "lerobot-lam-precompute",
        *dataset_flags(config.dataset.repo_id, config.dataset.root),
        f"--lam.path={config.output_dir}",
        f"--camera_key={camera}",
        f"--frame_stride={config.frame_stride}",
        f"--output_dir={config.output_dir}_tokens",
    ]
    print(f"\nThe LAM is in {config.output_dir}.")
    print(next_step(command))


def main(argv: Sequence[str] | None = None) -> None:
    run_command(COMMAND, fit_lam, argv)


if __name__ == "__main__":
    lerobot_lam_commands.fit()
