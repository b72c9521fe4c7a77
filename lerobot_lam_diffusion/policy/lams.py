"""Find and open the LAM of each source of tokens, and check that the policy was trained with it.

Imports the LAM code only when a LAM is opened: training on precomputed tokens needs none.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.policy.cameras import camera_problems
from lerobot_lam_diffusion.sources import FIELDS, LamSource
from lerobot_lam_diffusion.tokens.dataset_check import check_metadata
from lerobot_lam_diffusion.utils.errors import LamError, LamNotFoundError, raise_problems, raise_unfit

if TYPE_CHECKING:
    from lerobot_lam_diffusion.lam import LatentActionModel
    from lerobot_lam_diffusion.tokens.provenance import LamInfo

logger = logging.getLogger(__name__)


def open_lam(config: DiffusionLamConfig, path: str, device: str = "cpu") -> "LatentActionModel":
    """Load one LAM in the policy's compute dtype."""
    from lerobot_lam_diffusion.lam import load_lam

    return load_lam(path, device=device, dtype=getattr(torch, config.lam_dtype))


def open_lams(config: DiffusionLamConfig) -> "list[LatentActionModel]":
    """Load the LAM of each source and check that it is the one that the policy expects.

    Returns:
        One LAM per source; a LAM shared by several sources is loaded once.

    Raises:
        LamNotFoundError: a LAM or camera is not named, or a LAM does not exist.
        UserError: a damaged LAM, another token shape, or another LAM than trained with.
    """
    folders = find_lams(config)
    loaded: dict[Path, LatentActionModel] = {}
    for source, folder in zip(config.token_sources, folders, strict=True):
        if folder not in loaded:
            loaded[folder] = open_lam(config, str(source.model_path))
    lams = [loaded[folder] for folder in folders]
    check_lams(config, lams)
    return lams


def find_lams(config: DiffusionLamConfig) -> list[Path]:
    """The folder of each source's LAM, with symbolic links resolved.

    Raises:
        LamNotFoundError: a LAM or camera is not named, or no LAM is there; all problems at once.
    """
    from lerobot_lam_diffusion.lam import resolve_lam

    sources = config.token_sources
    if any(source.model_path is None or source.camera_key is None for source in sources):
        raise LamNotFoundError(
            "this diffusion_lam policy needs LAM tokens, and there are none in the batch "
            f"({config.lam_tokens_key!r}) and no LAM to compute them: pass --policy.lam_model_path=<LAM "
            "folder or Hub id> and --policy.lam_camera_key=<camera that it looks at>"
            + (f", for each of the policy's {len(sources)} sources of tokens" if len(sources) > 1 else "")
        )
    folders: list[Path] = []
    errors = []
    for source in sources:
        try:
            folders.append(resolve_lam(str(source.model_path)).resolve())
        except LamError as error:
            errors.append(str(error))
    if errors:
        raise LamNotFoundError(
            "the policy's LAM is not where --policy.lam_model_path says; name another place by that flag. "
            + " ".join(dict.fromkeys(errors))
        )
    return folders


def local_fingerprint(path: str) -> str | None:
    """Fingerprint of a LAM that is on this machine; None where it would have to be fetched, or is no LAM."""
    from lerobot_lam_diffusion.lam import fingerprint_of, shipped_lams

    if path not in shipped_lams() and not Path(path).expanduser().is_dir():
        return None
    try:
        return fingerprint_of(path)
    except LamError:
        return None  # deployment will say so


def check_lams(config: DiffusionLamConfig, lams: "Sequence[LatentActionModel | LamInfo]") -> None:
    """Check, by fingerprint and token shape, that each source's LAM is the one that the policy expects.

    Raises:
        UserError: another token shape, another LAM than trained with, or two sources that are the same; all
            problems at once.
    """
    sources = config.token_sources
    problems = []
    for source, lam in zip(sources, lams, strict=True):
        own = []
        if config.lam_use_vq_tokens and not lam.num_codes:
            own.append(
                "it has no codebook, so its tokens are continuous: pass --policy.lam_use_vq_tokens=false"
            )
        own += lam_problems(config, source, lam, "LAM")
        name = str(source.model_path)
        problems.append((name if len(sources) == 1 else f"{name} for {source.camera_key}", own))
    views = [(source.camera_key, lam.fingerprint) for source, lam in zip(sources, lams, strict=True)]
    same = [
        f"sources {one} and {other} are the same: --policy.lam_camera_key={view[0]}, and "
        f"--policy.lam_model_path names the same LAM (fingerprint {view[1][:16]}…) for both; leave one of "
        "them out"
        for (one, view), (other, another) in combinations(enumerate(views, 1), 2)
        if view == another and view[0] is not None
    ]
    raise_unfit("LAM", problems, common=same)


def lam_problems(
    config: DiffusionLamConfig, source: LamSource, lam: Any, noun: str, remedy: str = ""
) -> list[str]:
    """Why a LAM is not the one that the policy expects; warns of another one where that is allowed.

    Args:
        lam: A loaded LAM, or the provenance of one.
        noun: What has its shape: the LAM itself, a store or a column.
        remedy: For another shape; begins with a colon.
    """
    problems = [
        f"--policy.{FIELDS[name]} is {getattr(source, name)}, the {noun} has {getattr(lam, name)}{remedy}"
        for name in ("num_learned_tokens", "action_latent_dim")
        if getattr(source, name) not in (None, getattr(lam, name))
    ]
    if source.fingerprint in (None, lam.fingerprint):
        return problems
    trained_with = str(source.fingerprint)[:16]
    other = f"the LAM's fingerprint is {lam.fingerprint[:16]}…, the policy was trained with {trained_with}…"
    if not config.lam_allow_mismatch:
        anyway = "" if problems else ", or continue with this one by --policy.lam_allow_mismatch=true"
        return [*problems, f"{other}: use that LAM, or its tokens{anyway}"]
    if not problems:
        logger.warning("ANOTHER LAM THAN TRAINED WITH: %s. Its tokens mean something else.", other)
    return problems


def resolve_live_sources(
    config: DiffusionLamConfig, dataset_meta: Any, lams: "Sequence[LatentActionModel]"
) -> None:
    """Copy the metadata of the LAMs into the config of a policy that computes tokens on the fly.

    Args:
        dataset_meta: `LeRobotDatasetMetadata`, or None outside training.
        lams: The LAM of each source, checked by `open_lams`.

    Raises:
        UserError: the dataset brings tokens of its own as well, or there is no such camera.
    """
    from lerobot_lam_diffusion.lam import recorded_path

    if dataset_meta is not None:
        check_metadata(dataset_meta)
    sources = config.token_sources
    problems = camera_problems(config, [source.camera_key for source in sources], dataset_meta)
    if dataset_meta is not None and config.lam_tokens_key in dataset_meta.features:
        problems.append(
            f"dataset {dataset_meta.repo_id!r} has tokens of its own, column {config.lam_tokens_key!r}: "
            "train on them with --policy.use_precomputed_lam_tokens=true, or name another "
            "--policy.lam_tokens_key"
        )
    raise_problems("tokens cannot be computed on the fly", problems)
    if config.lam_frame_stride is None and dataset_meta is not None:
        _propose_stride(lams, dataset_meta.fps)
    config.lam_frame_stride = config.lam_frame_stride or 1
    resolved = []
    for source, lam in zip(sources, lams, strict=True):
        trained: dict[str, str] = {}
        if dataset_meta is not None:
            path = recorded_path(str(source.model_path))
            trained = {"fingerprint": lam.fingerprint, "trained_on": f"live:{path}", "model_path": path}
        resolved.append(with_shape(source, lam, **trained))
    record_sources(config, resolved)


def warn_of_another_rate(config: DiffusionLamConfig, dataset_meta: Any) -> None:
    """Warn of fine-tuning at another frame rate, where a stride spans another time."""
    before, fps = config.lam_fps, float(dataset_meta.fps)
    if before is not None and config.lam_source is not None and abs(before - fps) > 1e-6 * fps:
        logger.warning(
            "The policy was trained at %g frames per second, dataset %r has %g: a stride of 1 frame there "
            "spans the time of %.3g frames here, and tokens of another time mean other motion. Set "
            "--policy.lam_frame_stride accordingly.",
            before, dataset_meta.repo_id, fps, fps / before,
        )  # fmt: skip


def _propose_stride(lams: "Sequence[LatentActionModel]", fps: float) -> None:
    """On the fly the LAM's own stride can only be suggested: frames are requested before the LAM is known."""
    from lerobot_lam_diffusion.lam import proposed_stride

    stride = proposed_stride(lams, fps)
    if stride is not None and stride > 1:
        logger.warning(
            "lam_frame_stride is unset, so the frames of a pair are 1 frame = %.2g s apart; the LAM was "
            "trained on pairs %.2g s apart. Pass --policy.lam_frame_stride=%d for that.",
            1 / fps, stride / fps, stride,
        )  # fmt: skip


def with_shape(source: LamSource, lam: Any, **changes: Any) -> LamSource:
    """The source with the token shape and scale of a LAM (or its provenance), and other `changes`."""
    return replace(
        source,
        num_learned_tokens=lam.num_learned_tokens,
        action_latent_dim=lam.action_latent_dim,
        token_scale=fixed_scale(source, lam.token_scale),
        **changes,
    )


def fixed_scale(source: LamSource, scale: float) -> float:
    """What tokens are divided by, fixed once: a checkpoint that was trained without a scale keeps to 1."""
    if source.token_scale is not None:
        return source.token_scale
    return scale if source.trained_on is None else 1.0


def record_sources(config: DiffusionLamConfig, resolved: list[LamSource]) -> None:
    """Write the sources that training uses into the config; an allowed mismatch is cleared."""
    before = [source.fingerprint for source in config.token_sources]
    if any(old not in (None, new.fingerprint) for old, new in zip(before, resolved, strict=True)):
        config.lam_allow_mismatch = False
    config.set_token_sources(resolved)
