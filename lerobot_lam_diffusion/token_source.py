"""Where a policy's tokens come from, settled before its first training step.

The policy's `__init__` gets the dataset's metadata from LeRobot's `make_policy` in training. Here the token
stores are opened and checked against that dataset, and what they say about their LAMs enters the config, so
that the checkpoint knows how it was fed. At deployment there is no dataset, and nothing is opened.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lerobot_lam_diffusion.camera_names import (
    check_cameras,
    frame_size,
    may_be_exchanged,
    named_by_policy,
    presumed_names,
)
from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.problems import (
    ColumnError,
    DatasetError,
    TrainingError,
    UserError,
    raise_problems,
    raise_unfit,
)
from lerobot_lam_diffusion.sources import LamSource
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.column import TokenColumn, read_column
from lerobot_lam_diffusion.tokens.dataset_check import check_metadata, not_rgb
from lerobot_lam_diffusion.tokens.joined import JoinedStores, differences, join_stores, open_stores
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance

logger = logging.getLogger(__name__)


def settle_precomputed_source(
    config: DiffusionLamConfig, dataset_meta: Any, names: Mapping[str, str] | None = None
) -> TokenStore | JoinedStores | None:
    """Open the stores that `config` names, check them, and copy their provenance into `config`.

    Args:
        config: Of a policy in precomputed mode; fields that are unset are filled in.
        dataset_meta: `LeRobotDatasetMetadata`, or None outside training.
        names: The policy's names of cameras → the dataset's, as far as they are known (`camera_names`).

    Returns:
        The store, several as one, or None if the tokens come with the batch (native column,
        `LamTokenDataset`), the policy is not being trained from a dataset, or the stores of `auto` have to
        wait for the names of the cameras (`settle_first_batch`).

    Raises:
        ValueError: no source, two kinds of source, or sources that contradict the config or one another.
        TokenStoreError: a store is missing, damaged or of another dataset.
    """
    sources = config.token_sources
    paths = [source.tokens_path for source in sources]
    trained_before = config.lam_source is not None
    if dataset_meta is None and (None in paths or trained_before):
        return None

    if dataset_meta is not None:
        check_metadata(dataset_meta)
    column = dataset_meta.features.get(config.lam_tokens_key) if dataset_meta is not None else None
    if None in paths:
        _settle_column(config, column, dataset_meta)
        return None
    if column is not None:
        raise ColumnError(
            f"two sources of LAM tokens: --policy.lam_tokens_path={_listed(paths)} and the column "
            f"{config.lam_tokens_key!r} of dataset {dataset_meta.repo_id!r}. Leave lam_tokens_path unset to "
            "train on the column, or name another --policy.lam_tokens_key to train on the store"
        )
    if sources[0].is_auto:
        from lerobot_lam_diffusion.auto_tokens import (
            cached_stores,
            resolved_lams,
        )  # no other store needs a LAM

        if names is None and dataset_meta is not None and may_be_exchanged(config, dataset_meta):
            resolved_lams(config)
            logger.info("LAM tokens: the first batch tells which cameras they are of (--rename_map).")
            return None
        stores = cached_stores(config, dataset_meta, names)
    else:
        try:
            stores = open_stores([str(path) for path in paths], dataset_meta)
        except UserError as error:
            raise type(error)(f"--policy.lam_tokens_path={_listed(paths)}: {error}") from None
    if config.lam_live_cache is not None:
        logger.warning("lam_live_cache is for tokens on the fly: with precomputed ones it does nothing.")
    _settle_stores(config, stores, dataset_meta)
    return join_stores(stores)


def settle_first_batch(
    config: DiffusionLamConfig,
    store: TokenStore | JoinedStores | None,
    dataset_meta: Any,
    names: Mapping[str, str] | None,
    given: Sequence[LamSource],
) -> TokenStore | JoinedStores | None:
    """Settle what the first batch of a training tells: which camera of the dataset is which of the policy's.

    Args:
        store: What `settle_precomputed_source` returned.
        names: The policy's name of each camera → the dataset's; None if the batch does not tell.
        given: The sources as they were before they were settled.

    Returns:
        The store, or that of `auto`, which had to wait.

    Raises:
        UserError: the tokens are of another camera than the policy's.
    """
    are_told, names = names is not None, names or presumed_names(config, dataset_meta)
    if store is None and config.use_precomputed_lam_tokens and config.token_sources[0].is_auto:
        store = settle_precomputed_source(config, dataset_meta, names)
    cameras = _cameras_of_tokens(config, store, dataset_meta)
    config.set_token_sources(
        [
            source
            if camera is None or before.camera_key is not None
            else replace(source, camera_key=named_by_policy(names, camera))
            for source, before, camera in zip(config.token_sources, given, cameras, strict=True)
        ]
    )
    check_cameras(config, names, cameras, are_all=are_told)
    config.set_token_sources(
        [
            replace(
                source,
                frame_size=frame_size(dataset_meta, camera or names.get(str(source.camera_key))),
            )
            for source, camera in zip(config.token_sources, cameras, strict=True)
        ]
    )
    return store


def _cameras_of_tokens(
    config: DiffusionLamConfig, store: TokenStore | JoinedStores | None, dataset_meta: Any
) -> list[str | None]:
    """The dataset's name of the camera that each source's tokens are of; None if it is not known."""
    provenances: list[Provenance | None] = [None] * len(config.token_sources)
    if store is not None:
        stores = store.stores if isinstance(store, JoinedStores) else (store,)
        provenances = [each.provenance for each in stores]
    elif config.use_precomputed_lam_tokens and config.lam_tokens_key in dataset_meta.features:
        column = read_column(dataset_meta, config.lam_tokens_key)
        provenances = [column.provenance if column is not None else None]
    return [told.camera_key if told is not None else None for told in provenances]


def settle_live_source(config: DiffusionLamConfig, dataset_meta: Any, lams: Sequence[Any]) -> None:
    """Copy what the LAMs say about themselves into the config of a policy that computes tokens on the fly.

    Args:
        lams: The opened LAM of each source (`live_tokens.open_lams` has checked that they fit the config).
        dataset_meta: `LeRobotDatasetMetadata`, or None outside training.

    Raises:
        UserError: the dataset brings tokens of its own as well, or there is no such camera.
    """
    if dataset_meta is not None:
        check_metadata(dataset_meta)
    sources = config.token_sources
    problems = _camera_problems(config, sources, dataset_meta)
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
    settled = []
    for source, lam in zip(sources, lams, strict=True):
        known = replace(
            source,
            num_learned_tokens=lam.num_learned_tokens,
            action_latent_dim=lam.action_latent_dim,
            token_scale=_scale(source, lam.token_scale),
        )
        if dataset_meta is not None:
            known = replace(known, fingerprint=lam.fingerprint, origin=f"live:{source.model_path}")
        settled.append(known)
    _write(config, settled)


def _propose_stride(lams: Sequence[Any], fps: float) -> None:
    """Frames are asked for before the LAM is known, so on the fly its own stride can only be told."""
    from lerobot_lam_diffusion.lam import proposed_stride  # a store needs no LAM

    stride = proposed_stride(lams, fps)
    if stride is not None and stride > 1:
        logger.warning(
            "lam_frame_stride is unset, so the frames of a pair are 1 frame = %.2g s apart; the LAM was "
            "trained on pairs %.2g s apart. Pass --policy.lam_frame_stride=%d for that.",
            1 / fps, stride / fps, stride,
        )  # fmt: skip


def _write(config: DiffusionLamConfig, settled: list[LamSource]) -> None:
    """The policy is trained with these LAMs from now on; a mismatch that was allowed is settled."""
    trained_with = [source.fingerprint for source in config.token_sources]
    if any(a not in (None, b.fingerprint) for a, b in zip(trained_with, settled, strict=True)):
        config.lam_allow_mismatch = False
    config.set_token_sources(settled)


def _scale(source: LamSource, scale: float) -> float:
    """What tokens are divided by, fixed once: a checkpoint that was trained without a scale keeps to 1."""
    if source.token_scale is not None:
        return source.token_scale
    return scale if source.origin is None else 1.0


def _settle_column(config: DiffusionLamConfig, column: dict | None, dataset_meta: Any) -> None:
    sources = config.token_sources
    if column is None:
        raise TrainingError(
            f"no LAM tokens to train on: dataset {dataset_meta.repo_id!r} has no column "
            f"{config.lam_tokens_key!r} and --policy.lam_tokens_path is unset. Make a store with "
            f"lerobot-lam-precompute --dataset.repo_id={dataset_meta.repo_id} --lam.path=<LAM> "
            "--camera_key=<camera> --output_dir=<folder> and pass --policy.lam_tokens_path=<folder>, or let "
            "training make it: --policy.lam_tokens_path=auto --policy.lam_model_path=<LAM> "
            "--policy.lam_camera_key=<camera>"
        )
    if len(sources) > 1:
        raise ColumnError(
            f"column {config.lam_tokens_key!r} of dataset {dataset_meta.repo_id!r} holds the tokens of one "
            f"camera and LAM, the policy has {len(sources)} sources of tokens. Give each field lam_… one "
            "entry to train on the column, or name a token store for each by --policy.lam_tokens_path and "
            "another --policy.lam_tokens_key"
        )
    (source,) = sources
    _refuse_offsets_of_column(config, dataset_meta)
    known = read_column(dataset_meta, config.lam_tokens_key)
    if known is not None:
        _settle_known_column(config, source, known, dataset_meta)
        return
    shape = tuple(column["shape"])
    if shape != (config.lam_token_dim,):
        raise ColumnError(
            f"column {config.lam_tokens_key!r} has shape {shape}, the policy expects "
            f"({config.lam_token_dim},) = lam_num_learned_tokens * lam_action_latent_dim; set "
            "--policy.lam_num_learned_tokens and --policy.lam_action_latent_dim to the LAM's"
        )
    # A column of the user's own does not tell its LAM's codebook.
    settled = replace(source, token_scale=_scale(source, 1.0), origin=f"column:{config.lam_tokens_key}")
    config.set_token_sources([settled])
    logger.info("LAM tokens: the dataset's column %s.", config.lam_tokens_key)
    _warn_of_missing_lams(config, dataset_meta)


def _refuse_offsets_of_column(config: DiffusionLamConfig, dataset_meta: Any) -> None:
    """LeRobot delivers a column at the frames of the policy's observations, and has one list for them all."""
    offsets = config.lam_token_offsets
    delivered = list(range(1 - config.n_obs_steps, 1))
    if offsets is not None and offsets != delivered[-len(offsets) :]:
        raise ColumnError(
            f"--policy.lam_token_offsets={offsets}: LeRobot delivers the column {config.lam_tokens_key!r} of "
            f"dataset {dataset_meta.repo_id!r} at the policy's observations only, offsets {delivered}; for "
            "others it would decode the camera's frames at all of them. Train on a token store: "
            "lerobot-lam-precompute, then --policy.lam_tokens_path and another --policy.lam_tokens_key"
        )


def _settle_known_column(
    config: DiffusionLamConfig, source: LamSource, column: TokenColumn, dataset_meta: Any
) -> None:
    """As a store: the column says what its tokens are (see `tokens/column.py`)."""
    problems = _contradictions(config, source, column, dataset_meta)
    what = f"column {column.key!r} of dataset {dataset_meta.repo_id!r}"
    raise_problems(f"{what} does not fit the policy", problems, TrainingError)
    config.lam_frame_stride = column.frame_stride
    _adopt_dtype(config, column.provenance)
    settled = _adopted(config, source, column.provenance, dataset_meta)
    _write(config, [replace(settled, origin=f"column:{column.key}")])
    logger.info("LAM tokens: %s, the dataset's column %s (%s).", column.kind, column.key, column.state)
    _warn_of_missing_lams(config, dataset_meta)


def _settle_stores(config: DiffusionLamConfig, stores: Sequence[TokenStore], dataset_meta: Any) -> None:
    sources = config.token_sources
    problems = [
        (store.name, _contradictions(config, source, store, dataset_meta))
        for source, store in zip(sources, stores, strict=True)
    ]
    raise_unfit("token store", problems, common=differences(stores))
    config.lam_frame_stride = stores[0].frame_stride
    settled = []
    for source, store in zip(sources, stores, strict=True):
        if store.provenance is None:
            known = replace(source, token_scale=_scale(source, 1.0))
        else:
            _adopt_dtype(config, store.provenance)
            known = _adopted(config, source, store.provenance, dataset_meta)
        if source.is_auto:  # its LAM was found there; where the store's builder had it may be gone
            known = replace(known, model_path=source.model_path)
        elif store.hub_id is not None:
            known = replace(known, tokens_path=store.hub_id)  # a resumed run goes on with this commit
        settled.append(replace(known, origin=f"store:{store.name}"))
        logger.info("LAM tokens: %s, from %s (%s).", store.kind, store.name, store.coverage)
    _write(config, settled)
    _warn_of_missing_lams(config, dataset_meta)


def _adopt_dtype(config: DiffusionLamConfig, provenance: Provenance) -> None:
    if config.lam_dtype != provenance.dtype:
        logger.info("lam_dtype is %s, as the tokens were made.", provenance.dtype)
    config.lam_dtype = provenance.dtype


def _adopted(
    config: DiffusionLamConfig, source: LamSource, provenance: Provenance, dataset_meta: Any
) -> LamSource:
    """The source with what its tokens say of themselves."""
    lam = provenance.lam
    another = source.origin is not None and source.fingerprint != lam.fingerprint
    return replace(
        source,
        model_path=lam.path if source.model_path is None or another else source.model_path,
        camera_key=source.camera_key or _camera_of_policy(config, provenance.camera_key, dataset_meta),
        num_learned_tokens=lam.num_learned_tokens,
        action_latent_dim=lam.action_latent_dim,
        fingerprint=lam.fingerprint,
        token_scale=_scale(source, lam.token_scale),
    )


def _warn_of_missing_lams(config: DiffusionLamConfig, dataset_meta: Any) -> None:
    """Training needs no LAM, an evaluation in an environment does: say so now, not at step 20,000."""
    if not config.past_token_deltas:
        return  # a guide gives its tokens
    reasons: dict[str, None] = {}  # each once
    for source in config.token_sources:
        missing = _missing_lam(source)
        reasons |= dict.fromkeys([missing] if missing else _camera_problems(config, [source], dataset_meta))
    for reason in reasons:
        logger.warning(
            "%s. Training goes on; an evaluation in an environment (--env.type) and deployment need "
            "--policy.lam_model_path and --policy.lam_camera_key.",
            reason[0].upper() + reason[1:],
        )


def warn_of_missing_guide(config: DiffusionLamConfig) -> None:
    """Of a training on tokens of what comes next, without a guide for evaluations."""
    future = config.future_token_deltas
    if future and config.lam_guidance is None and config.lam_missing == "error":
        logger.warning(
            "Training on tokens of what comes next (lam_token_offsets=%s); an evaluation in an environment "
            "(--env.type) and deployment need --policy.lam_guidance=<video, or STORE#episode>%s.",
            future,
            ", or --policy.lam_missing=zero" if config.lam_token_dropout else "",
        )


def _missing_lam(source: LamSource) -> str | None:
    path = source.model_path
    if path is None:
        return "the LAM of these tokens is not known"
    if path.startswith(("/", ".", "~")) and not Path(path).expanduser().exists():  # no Hub id begins so
        return f"the LAM of these tokens is not at {path}"
    if source.camera_key is None:
        return "it is not known which of the policy's cameras the LAM looks at"
    return None


def _contradictions(
    config: DiffusionLamConfig, source: LamSource, store: TokenStore | TokenColumn, dataset_meta: Any
) -> list[str]:
    """Fields that are set and differ from what the store (or column) holds."""
    noun = "store" if isinstance(store, TokenStore) else "column"
    told: list[tuple[str, Any, Any]] = [("lam_frame_stride", config.lam_frame_stride, store.frame_stride)]
    if store.provenance is not None:
        lam = store.provenance.lam
        told += [
            ("lam_num_learned_tokens", source.num_learned_tokens, lam.num_learned_tokens),
            ("lam_action_latent_dim", source.action_latent_dim, lam.action_latent_dim),
        ]
        camera = source.camera_key
        known = [] if dataset_meta is None else _cameras_in_sight(config, dataset_meta)
        # Another name of the store's camera is what a `rename_map` gives; the first batch tells.
        is_certain = dataset_meta is not None and not may_be_exchanged(config, dataset_meta)
        if is_certain and (camera in dataset_meta.camera_keys or camera not in known):
            told.append(("lam_camera_key", camera, store.provenance.camera_key))
    elif store.token_dim != source.token_dim:
        told.append(("lam_num_learned_tokens * lam_action_latent_dim", source.token_dim, store.token_dim))
    problems = [
        f"--policy.{name} is {want}, the {noun} has {have}: leave that flag out, or train on another {noun}"
        for name, want, have in told
        if want not in (None, have)
    ]
    of_another_shape = any(
        "num_" in name or "_dim" in name for name, want, have in told if want not in (None, have)
    )
    trained_with = source.fingerprint
    made_by = store.provenance.lam.fingerprint if store.provenance else trained_with
    if trained_with not in (None, made_by) and not config.lam_allow_mismatch:
        problems.append(
            f"it was made by the LAM with fingerprint {str(made_by)[:16]}…, the policy was trained with "
            f"{str(trained_with)[:16]}…: train on a {noun} of that LAM"
            + ("" if of_another_shape else ", or go on with it by --policy.lam_allow_mismatch=true")
        )
    if config.lam_use_vq_tokens != (store.kind == VQ):
        flag = str(store.kind == VQ).lower()
        problems.append(
            f"it holds {store.kind} tokens: pass --policy.lam_use_vq_tokens={flag} or extract the other kind"
        )
    return problems


def _camera_of_policy(config: DiffusionLamConfig, dataset_camera: str, dataset_meta: Any) -> str | None:
    """The store's camera under the policy's name for it; None where a `rename_map` has hidden it."""
    if dataset_camera in _cameras_in_sight(config, dataset_meta):
        return dataset_camera
    cameras = list(config.image_features)
    only_one = len(cameras) == 1 and dataset_meta is not None and len(dataset_meta.camera_keys) == 1
    return cameras[0] if only_one else None


def dataset_camera(
    config: DiffusionLamConfig, camera: str, dataset_meta: Any, names: Mapping[str, str] | None = None
) -> str:
    """The dataset's own name of a camera of `lam_camera_key`, which is the policy's name.

    A `rename_map` is not shown to the policy: without `names` its new name is understood where there is but
    one camera.

    Args:
        names: The policy's names of cameras → the dataset's, from a batch.

    Raises:
        UserError: it is not known which camera of the dataset that is.
    """
    others = not_rgb(dataset_meta)
    cameras = [key for key in dataset_meta.camera_keys if key not in others]
    if names is not None and camera in names:
        camera = names[camera]
    if camera in cameras:
        return camera
    if len(cameras) == 1 and list(config.image_features) == [camera]:
        return cameras[0]
    if camera in others:
        raise DatasetError(
            f"--policy.lam_camera_key={camera} {others[camera]}, and a LAM looks at RGB: dataset "
            f"{dataset_meta.repo_id!r} has the RGB cameras {cameras}; name one of them"
        )
    raise DatasetError(
        f"--policy.lam_camera_key={camera} is not among the RGB cameras {cameras} of dataset "
        f"{dataset_meta.repo_id!r}; name one of them. If --rename_map gives it that name, it cannot be known "
        "which one it was, as --policy.lam_tokens_path=auto and --policy.lam_live_cache have to: make the "
        "store with lerobot-lam-precompute --camera_key=<the dataset's own name> and pass its path"
    )


def _camera_problems(
    config: DiffusionLamConfig, sources: Sequence[LamSource], dataset_meta: Any
) -> list[str]:
    """Problems with LAMs' cameras that will not be among the policy's frames.

    Which cameras a robot or environment has shows when the first frames come.
    """
    cameras = _cameras_in_sight(config, dataset_meta)
    if not cameras or (dataset_meta is None and config.lam_source is not None):
        return []
    unknown = dict.fromkeys(source.camera_key for source in sources if source.camera_key not in cameras)
    others = {} if dataset_meta is None else not_rgb(dataset_meta)
    looked_at = dict.fromkeys(str(source.camera_key) for source in sources if source.camera_key in cameras)
    problems = [
        f"--policy.lam_camera_key={camera} {others[camera]}, and a LAM looks at RGB; pass another camera"
        for camera in looked_at
        if camera in others
    ]
    problems += [
        f"--policy.lam_camera_key={camera} is not among the policy's cameras {cameras}; pass one of them"
        for camera in unknown
    ]
    return problems


def _cameras_in_sight(config: DiffusionLamConfig, dataset_meta: Any) -> list[str]:
    """The policy's cameras, and others of the dataset: a LAM may look at one that is no input of the policy.

    Where the policy has other names than the dataset there is a `rename_map`, which the policy is not shown:
    then only its own cameras are certain.
    """
    cameras = list(config.image_features)
    if dataset_meta is None or not set(cameras) <= set(dataset_meta.camera_keys):
        return cameras
    hidden = {*cameras, *dataset_meta.depth_keys}
    return cameras + [key for key in dataset_meta.camera_keys if key not in hidden]


def warn_of_pauses(dataset_meta: Any) -> None:
    """Warn of a recording whose neighbouring rows need not be neighbours in time."""
    if "intervention" in dataset_meta.features:
        logger.warning(
            "Dataset %r has a column 'intervention', as DAgger recordings of lerobot-rollout have. If it was "
            "recorded with record_autonomous=true, its episodes go on over pauses that were not "
            "recorded: the token of the first frame after a pause is not motion. Without that flag each "
            "correction is an episode of its own, and all is well.",
            dataset_meta.repo_id,
        )


def _listed(values: Sequence[Any]) -> str:
    """Of a flag: the value, or a list in brackets."""
    return str(values[0]) if len(values) == 1 else f"[{','.join(map(str, values))}]"
