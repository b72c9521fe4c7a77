"""Where a policy's tokens come from, settled before its first training step.

The policy's `__init__` gets the dataset's metadata from LeRobot's `make_policy` in training. Here the token
store is opened and checked against that dataset, and what it says about its LAM enters the config, so that
the checkpoint knows how it was fed. At deployment there is no dataset, and nothing is opened.
"""

import logging
from pathlib import Path
from typing import Any

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig, single
from lerobot_lam_diffusion.constants import AUTO
from lerobot_lam_diffusion.problems import UserError, raise_problems
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.column import TokenColumn, read_column
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.writer import codebook_scale

logger = logging.getLogger(__name__)


def settle_precomputed_source(config: DiffusionLamConfig, dataset_meta: Any) -> TokenStore | None:
    """Open the store that `config` names, check it, and copy its provenance into `config`.

    Args:
        config: Of a policy in precomputed mode; fields that are unset are filled in.
        dataset_meta: `LeRobotDatasetMetadata`, or None outside training.

    Returns:
        The store, or None if the tokens come with the batch (native column, `LamTokenDataset`) or the policy
        is not being trained from a dataset.

    Raises:
        ValueError: no source, two sources, or a source that contradicts the config.
        TokenStoreError: the store is missing, damaged or of another dataset.
    """
    path = single(config.lam_tokens_path)
    trained_before = config.lam_source is not None
    if dataset_meta is None and (path is None or trained_before):
        return None

    column = dataset_meta.features.get(config.lam_tokens_key) if dataset_meta is not None else None
    if path is None:
        _settle_column(config, column, dataset_meta)
        return None
    if column is not None:
        raise UserError(
            f"two sources of LAM tokens: --policy.lam_tokens_path={path} and the column "
            f"{config.lam_tokens_key!r} of dataset {dataset_meta.repo_id!r}. Leave lam_tokens_path unset to "
            "train on the column, or name another --policy.lam_tokens_key to train on the store"
        )
    if path == AUTO:
        return _settle_auto(config, dataset_meta)
    store = TokenStore.open(path, dataset_meta)
    _settle_store(config, store, dataset_meta)
    return store


def settle_live_source(config: DiffusionLamConfig, dataset_meta: Any, lam: Any) -> None:
    """Copy what the LAM says about itself into the config of a policy that computes tokens on the fly.

    Args:
        lam: The opened LAM (`live_tokens.open_lam` has checked that it fits the config).
        dataset_meta: `LeRobotDatasetMetadata`, or None outside training.

    Raises:
        UserError: the dataset brings tokens of its own as well, or the policy has no such camera.
    """
    problems = []
    camera = single(config.lam_camera_key)
    if config.image_features and camera not in config.image_features:
        problems.append(_unknown_camera(config))
    if dataset_meta is not None and config.lam_tokens_key in dataset_meta.features:
        problems.append(
            f"dataset {dataset_meta.repo_id!r} has tokens of its own, column {config.lam_tokens_key!r}: "
            "train on them with --policy.use_precomputed_lam_tokens=true, or name another "
            "--policy.lam_tokens_key"
        )
    raise_problems("tokens cannot be computed on the fly", problems)
    config.lam_num_learned_tokens = lam.num_learned_tokens
    config.lam_action_latent_dim = lam.action_latent_dim
    config.lam_frame_stride = config.lam_frame_stride or 1
    _settle_scale(config, codebook_scale(lam.codebook.cpu()))
    if dataset_meta is not None:
        _settle_fingerprint(config, lam.fingerprint)
        config.lam_source = f"live:{single(config.lam_model_path)}"
        logger.info("LAM tokens: on the fly, by %s from %s.", single(config.lam_model_path), camera)


def _settle_scale(config: DiffusionLamConfig, scale: float) -> None:
    """Fix what tokens are divided by, once: a checkpoint that was trained without a scale keeps to 1."""
    if config.lam_token_scale is None:
        config.lam_token_scale = scale if config.lam_source is None else 1.0


def _settle_fingerprint(config: DiffusionLamConfig, fingerprint: str) -> None:
    """It is this LAM that the policy is trained with from now on; a mismatch that was allowed is settled."""
    if config.lam_fingerprint not in (None, fingerprint):
        config.lam_allow_mismatch = False
    config.lam_fingerprint = fingerprint


def _unknown_camera(config: DiffusionLamConfig) -> str:
    return (
        f"--policy.lam_camera_key={single(config.lam_camera_key)} is not among the policy's cameras "
        f"{list(config.image_features)}"
    )


def _settle_column(config: DiffusionLamConfig, column: dict | None, dataset_meta: Any) -> None:
    if column is None:
        raise UserError(
            f"no LAM tokens to train on: dataset {dataset_meta.repo_id!r} has no column "
            f"{config.lam_tokens_key!r} and --policy.lam_tokens_path is unset. Make a store with "
            f"lerobot-lam-precompute --dataset.repo_id={dataset_meta.repo_id} --lam.path=<LAM> "
            "--camera_key=<camera> --output_dir=<folder> and pass --policy.lam_tokens_path=<folder>"
        )
    known = read_column(dataset_meta, config.lam_tokens_key)
    if known is not None:
        _settle_known_column(config, known, dataset_meta)
        return
    shape = tuple(column["shape"])
    if shape != (config.lam_token_dim,):
        raise UserError(
            f"column {config.lam_tokens_key!r} has shape {shape}, the policy expects "
            f"({config.lam_token_dim},) = lam_num_learned_tokens * lam_action_latent_dim; set "
            "--policy.lam_num_learned_tokens and --policy.lam_action_latent_dim to the LAM's"
        )
    _settle_scale(config, 1.0)  # a column of the user's own does not tell its LAM's codebook
    config.lam_source = f"column:{config.lam_tokens_key}"
    logger.info("LAM tokens: the dataset's column %s.", config.lam_tokens_key)
    _warn_of_missing_lam(config)


def _settle_known_column(config: DiffusionLamConfig, column: TokenColumn, dataset_meta: Any) -> None:
    """As a store: the column says what its tokens are (see `tokens/column.py`)."""
    problems = _contradictions(config, column, dataset_meta)
    what = f"column {column.key!r} of dataset {dataset_meta.repo_id!r}"
    raise_problems(f"{what} does not fit the policy", problems)
    config.lam_frame_stride = column.frame_stride
    _adopt_provenance(config, column.provenance, dataset_meta)
    config.lam_source = f"column:{column.key}"
    logger.info("LAM tokens: %s, the dataset's column %s (%s).", column.kind, column.key, column.state)
    _warn_of_missing_lam(config)


def _settle_auto(config: DiffusionLamConfig, dataset_meta: Any) -> TokenStore:
    from lerobot_lam_diffusion.auto_tokens import cached_store  # a store that a path names needs no LAM

    store = cached_store(config, dataset_meta)
    lam_path = config.lam_model_path
    _settle_store(config, store, dataset_meta)
    config.lam_model_path = lam_path  # it was found there; where the store's builder had it may be gone
    return store


def _settle_store(config: DiffusionLamConfig, store: TokenStore, dataset_meta: Any) -> None:
    problems = _contradictions(config, store, dataset_meta)
    raise_problems(f"token store {store.name} does not fit the policy", problems)
    config.lam_frame_stride = store.frame_stride
    if store.provenance is None:
        _settle_scale(config, 1.0)
    else:
        _adopt_provenance(config, store.provenance, dataset_meta)
    config.lam_source = f"store:{store.name}"
    if store.hub_id is not None:
        config.lam_tokens_path = store.hub_id  # a resumed run goes on with this commit
    logger.info("LAM tokens: %s, from %s (%s).", store.kind, store.name, store.coverage)
    _warn_of_missing_lam(config)


def _adopt_provenance(config: DiffusionLamConfig, provenance: Provenance, dataset_meta: Any) -> None:
    lam = provenance.lam
    config.lam_num_learned_tokens = lam.num_learned_tokens
    config.lam_action_latent_dim = lam.action_latent_dim
    _settle_scale(config, lam.token_scale)
    if config.lam_model_path is None or (config.lam_source and config.lam_fingerprint != lam.fingerprint):
        config.lam_model_path = lam.path
    _settle_fingerprint(config, lam.fingerprint)
    if config.lam_dtype != provenance.dtype:
        logger.info("lam_dtype is %s, as the tokens were made.", provenance.dtype)
    config.lam_dtype = provenance.dtype
    if config.lam_camera_key is None:
        config.lam_camera_key = _camera_of_policy(config, provenance.camera_key, dataset_meta)


def _warn_of_missing_lam(config: DiffusionLamConfig) -> None:
    """Training needs no LAM, an evaluation in an environment does: say so now, not at step 20,000."""
    path, camera = single(config.lam_model_path), single(config.lam_camera_key)
    if path is None:
        reason = "the LAM of these tokens is not known"
    elif path.startswith(("/", ".", "~")) and not Path(path).expanduser().exists():  # no Hub id begins so
        reason = f"the LAM of these tokens is not at {path}"
    elif camera is None:
        reason = "it is not known which of the policy's cameras the LAM looks at"
    elif config.image_features and camera not in config.image_features:
        reason = _unknown_camera(config)
    else:
        return
    logger.warning(
        "%s. Training goes on; an evaluation in an environment (--env.type) and deployment need "
        "--policy.lam_model_path and --policy.lam_camera_key.",
        reason[0].upper() + reason[1:],
    )


def _contradictions(
    config: DiffusionLamConfig, store: TokenStore | TokenColumn, dataset_meta: Any
) -> list[str]:
    """Fields that are set and differ from what the store (or column) holds."""
    noun = "store" if isinstance(store, TokenStore) else "column"
    told: list[tuple[str, Any, Any]] = [("lam_frame_stride", config.lam_frame_stride, store.frame_stride)]
    if store.provenance is not None:
        lam = store.provenance.lam
        told += [
            ("lam_num_learned_tokens", config.lam_num_learned_tokens, lam.num_learned_tokens),
            ("lam_action_latent_dim", config.lam_action_latent_dim, lam.action_latent_dim),
        ]
        camera = single(config.lam_camera_key)
        if dataset_meta is not None and camera in dataset_meta.camera_keys:
            told.append(("lam_camera_key", camera, store.provenance.camera_key))
    elif store.token_dim != config.lam_token_dim:
        told.append(("lam_num_learned_tokens * lam_action_latent_dim", config.lam_token_dim, store.token_dim))
    problems = [
        f"--policy.{name} is {want}, the {noun} has {have}"
        for name, want, have in told
        if want not in (None, have)
    ]
    trained_with = single(config.lam_fingerprint)
    made_by = store.provenance.lam.fingerprint if store.provenance else trained_with
    if trained_with not in (None, made_by) and not config.lam_allow_mismatch:
        problems.append(
            f"it was made by the LAM with fingerprint {str(made_by)[:16]}…, the policy was trained with "
            f"{str(trained_with)[:16]}…: train on a {noun} of that LAM, or go on with the other one by "
            "--policy.lam_allow_mismatch=true"
        )
    if config.lam_use_vq_tokens != (store.kind == VQ):
        flag = str(store.kind == VQ).lower()
        problems.append(
            f"it holds {store.kind} tokens: pass --policy.lam_use_vq_tokens={flag} or extract the other kind"
        )
    return problems


def _camera_of_policy(config: DiffusionLamConfig, dataset_camera: str, dataset_meta: Any) -> str | None:
    """The store's camera under the policy's name for it; None where a `rename_map` may have hidden it."""
    cameras = list(config.image_features)
    if dataset_camera in cameras:
        return dataset_camera
    only_one = len(cameras) == 1 and dataset_meta is not None and len(dataset_meta.camera_keys) == 1
    return cameras[0] if only_one else None
