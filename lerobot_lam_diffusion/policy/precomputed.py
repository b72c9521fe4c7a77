"""Precomputed tokens of a policy: resolved and checked before its first training step.

LeRobot's `make_policy` passes the training dataset's metadata to the policy's `__init__`. Here the token
stores (or the dataset's column) are opened and checked against that dataset and the config, and their
provenance enters the config, so that the checkpoint records how it was trained. At deployment there is no
dataset, and nothing is opened.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.constants import OBS_LAM_CAMERAS
from lerobot_lam_diffusion.policy.cameras import (
    camera_problems,
    check_cameras,
    frame_size,
    may_be_exchanged,
    policy_camera,
    presumed_names,
    visible_cameras,
)
from lerobot_lam_diffusion.policy.lams import (
    fixed_scale,
    lam_problems,
    local_fingerprint,
    record_sources,
    with_shape,
)
from lerobot_lam_diffusion.sources import LamSource
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.column import TokenColumn, read_column
from lerobot_lam_diffusion.tokens.dataset_check import check_metadata
from lerobot_lam_diffusion.tokens.joined import JoinedStores, differences, join_stores, open_stores
from lerobot_lam_diffusion.tokens.provenance import VQ
from lerobot_lam_diffusion.utils.errors import (
    DatasetError,
    TrainingError,
    UserError,
    raise_problems,
    raise_unfit,
)

logger = logging.getLogger(__name__)


def resolve_precomputed_sources(
    config: DiffusionLamConfig, dataset_meta: Any, names: Mapping[str, str] | None = None
) -> TokenStore | JoinedStores | None:
    """Open the stores that `config` names, check them, and copy their provenance into `config`.

    Args:
        config: Of a policy in precomputed mode; fields that are unset are filled in.
        dataset_meta: `LeRobotDatasetMetadata`, or None outside training.
        names: The policy's names of cameras → the dataset's, as far as they are known (`cameras.py`).

    Returns:
        The store, several as one, or None if the tokens come with the batch (native column,
        `LamTokenDataset`), the policy is not being trained from a dataset, or the stores of `auto` have to
        wait for the names of the cameras (`resolve_first_batch`).

    Raises:
        ValueError: no source, two kinds of source, or sources that contradict the config or one another.
        TokenStoreError: a store is missing, damaged or of another dataset.
    """
    sources = config.token_sources
    paths = [source.tokens_path for source in sources]
    if dataset_meta is None and (None in paths or config.lam_source is not None):
        return None

    column = None
    if dataset_meta is not None:
        check_metadata(dataset_meta)
        column = dataset_meta.features.get(config.lam_tokens_key)
    if None in paths:
        _resolve_column(config, column, dataset_meta)
        return None
    flag = (
        f"--policy.lam_tokens_path={paths[0] if len(paths) == 1 else '[' + ','.join(map(str, paths)) + ']'}"
    )
    if column is not None:
        raise DatasetError(
            f"two sources of LAM tokens: {flag} and the column {config.lam_tokens_key!r} of dataset "
            f"{dataset_meta.repo_id!r}. Leave lam_tokens_path unset to train on the column, or name another "
            "--policy.lam_tokens_key to train on the store"
        )
    if sources[0].is_auto:
        from lerobot_lam_diffusion.policy.auto import cached_stores, described_lams  # imports precompute

        if names is None and dataset_meta is not None and may_be_exchanged(config, dataset_meta):
            described_lams(config)  # so that a wrong one fails early
            logger.info("LAM tokens: waiting for the first batch, which shows the cameras (--rename_map).")
            return None
        stores = cached_stores(config, dataset_meta, names)
    else:
        try:
            stores = open_stores([str(path) for path in paths], dataset_meta)
        except UserError as error:
            raise type(error)(f"{flag}: {error}") from None
    if dataset_meta is None:
        logger.warning(
            "%s is not checked against a dataset, since the policy was built without one: build it with "
            "LeRobot's make_policy(config, ds_meta=dataset.meta), or its tokens may be of other frames.",
            flag,
        )
    if config.lam_live_cache is not None:
        logger.warning("lam_live_cache is for tokens on the fly: with precomputed ones it does nothing.")
    _adopt_stores(config, stores, dataset_meta)
    return join_stores(stores)


def resolve_first_batch(
    config: DiffusionLamConfig,
    store: TokenStore | JoinedStores | None,
    dataset_meta: Any,
    batch: Mapping[str, Any],
    given: Sequence[LamSource],
) -> TokenStore | JoinedStores | None:
    """Resolve what the first training batch shows: which dataset camera each of the policy's cameras is.

    Args:
        store: What `resolve_precomputed_sources` returned.
        batch: Holds the policy's name for each camera → the dataset's under `observation.lam_cameras`.
        given: The sources before they were resolved.

    Returns:
        The store; for `auto`, possibly opened only now.

    Raises:
        UserError: the tokens come from another camera than the policy's.
    """
    known = batch.get(OBS_LAM_CAMERAS)
    names = known or presumed_names(config, dataset_meta)
    precomputed = config.use_precomputed_lam_tokens
    if known is None and (precomputed or config.lam_live_cache) and may_be_exchanged(config, dataset_meta):
        logger.warning(
            "The batch does not tell which of the dataset's cameras are which of the policy's (no %r: the "
            "pre-processor is not this policy's, or of a checkpoint of an earlier version). They are assumed "
            "to have the same names; under a --rename_map that exchanges cameras the tokens would be of "
            "another camera than the policy's: train without one.",
            OBS_LAM_CAMERAS,
        )
    if store is None and precomputed and config.token_sources[0].is_auto:
        store = resolve_precomputed_sources(config, dataset_meta, names)
    cameras = _cameras_of_tokens(config, store, dataset_meta)
    renamed = {of_dataset: name for name, of_dataset in reversed(list(names.items()))}
    resolved = []
    for source, before, camera in zip(config.token_sources, given, cameras, strict=True):
        if camera is not None and before.camera_key is None:
            source = replace(source, camera_key=renamed.get(camera))
        size = frame_size(dataset_meta, camera or names.get(str(source.camera_key)))
        resolved.append(replace(source, frame_size=size))
    config.set_token_sources(resolved)
    check_cameras(config, names, cameras, are_all=known is not None)
    return store


def _cameras_of_tokens(
    config: DiffusionLamConfig, store: TokenStore | JoinedStores | None, dataset_meta: Any
) -> list[str | None]:
    """The dataset's name of the camera that each source's tokens are of; None: not known."""
    if store is not None:
        stores = store.stores if isinstance(store, JoinedStores) else (store,)
        return [None if each.provenance is None else each.provenance.camera_key for each in stores]
    if config.use_precomputed_lam_tokens and config.lam_tokens_key in dataset_meta.features:
        column = read_column(dataset_meta, config.lam_tokens_key)
        return [None if column is None else column.provenance.camera_key]
    return [None] * len(config.token_sources)


def _resolve_column(config: DiffusionLamConfig, feature: dict | None, dataset_meta: Any) -> None:
    """Check the dataset's own column and copy what is known of it into `config`."""
    key, sources = config.lam_tokens_key, config.token_sources
    what = f"column {key!r} of dataset {dataset_meta.repo_id!r}"
    if feature is None:
        raise TrainingError(
            f"no LAM tokens to train on: dataset {dataset_meta.repo_id!r} has no column {key!r} and "
            "--policy.lam_tokens_path is unset. Make a store with lerobot-lam-precompute "
            f"--dataset.repo_id={dataset_meta.repo_id} --lam.path=<LAM> --camera_key=<camera> "
            "--output_dir=<folder> and pass --policy.lam_tokens_path=<folder>, or let training make it: "
            "--policy.lam_tokens_path=auto --policy.lam_model_path=<LAM> --policy.lam_camera_key=<camera>"
        )
    if len(sources) > 1:
        raise DatasetError(
            f"{what} holds the tokens of one camera and LAM, the policy has {len(sources)} sources of "
            "tokens. Give each field lam_… one entry to train on the column, or name a token store for each "
            "by --policy.lam_tokens_path and another --policy.lam_tokens_key"
        )
    offsets, delivered = config.lam_token_offsets, list(range(1 - config.n_obs_steps, 1))
    if offsets is not None and offsets != delivered[-len(offsets) :]:
        # LeRobot has one list of offsets for all observations, and a column is one of them.
        raise DatasetError(
            f"--policy.lam_token_offsets={offsets}: LeRobot delivers the {what} at the policy's observations "
            f"only, offsets {delivered}; for others it would decode the camera's frames at all of them. "
            "Train on a token store: lerobot-lam-precompute, then --policy.lam_tokens_path and another "
            "--policy.lam_tokens_key"
        )
    (source,) = sources
    column = read_column(dataset_meta, key)
    if column is not None:
        raise_problems(
            f"{what} does not fit the policy",
            _contradictions(config, source, column, dataset_meta),
            TrainingError,
        )
        config.lam_frame_stride = column.frame_stride
        resolved = _with_provenance(config, source, column, dataset_meta)
        logger.info("LAM tokens: %s, the dataset's column %s (%s).", column.kind, key, column.state)
        if column.is_changed:
            logger.warning(
                "Column %s may hold the tokens of other frames: %s. Check it with lerobot-lam-tokens verify "
                "--lam.path=<LAM>, or extract the tokens again.",
                key,
                column.derived,
            )
    else:  # made by the user: neither its LAM nor its codebook's scale is recorded
        shape = tuple(feature["shape"])
        if shape != (config.lam_token_dim,):
            raise DatasetError(
                f"column {key!r} has shape {shape}, the policy expects ({config.lam_token_dim},) = "
                "lam_num_learned_tokens * lam_action_latent_dim; set --policy.lam_num_learned_tokens and "
                "--policy.lam_action_latent_dim to the LAM's"
            )
        resolved = replace(source, token_scale=fixed_scale(source, 1.0))
        logger.info("LAM tokens: the dataset's column %s.", key)
    record_sources(config, [replace(resolved, trained_on=f"column:{key}")])
    _warn_of_missing_lams(config, dataset_meta)


def _adopt_stores(config: DiffusionLamConfig, stores: Sequence[TokenStore], dataset_meta: Any) -> None:
    """Check the stores against `config` and one another, and copy their provenance into it."""
    sources = config.token_sources
    problems = [
        (store.name, _contradictions(config, source, store, dataset_meta))
        for source, store in zip(sources, stores, strict=True)
    ]
    raise_unfit("token store", problems, common=differences(stores))
    config.lam_frame_stride = stores[0].frame_stride
    resolved = []
    for source, store in zip(sources, stores, strict=True):
        known = _with_provenance(config, source, store, dataset_meta)
        if source.is_auto:  # keep the path where the LAM was found: the recorded one may be gone
            from lerobot_lam_diffusion.lam import recorded_path  # imported to build the store anyway

            known = replace(known, model_path=recorded_path(str(source.model_path)))
        elif store.hub_id is not None:
            known = replace(known, tokens_path=store.hub_id)  # a resumed run stays at this commit
        resolved.append(replace(known, trained_on=f"store:{store.name}"))
        logger.info("LAM tokens: %s, from %s (%s).", store.kind, store.name, store.coverage)
    record_sources(config, resolved)
    _warn_of_missing_lams(config, dataset_meta)


def _with_provenance(
    config: DiffusionLamConfig, source: LamSource, tokens: TokenStore | TokenColumn, dataset_meta: Any
) -> LamSource:
    """The source, completed from the provenance of its tokens; `config` adopts their compute dtype."""
    provenance = tokens.provenance
    if provenance is None:
        return replace(source, token_scale=fixed_scale(source, 1.0))
    if config.lam_dtype != provenance.dtype:
        logger.info("lam_dtype is %s, as the tokens were made.", provenance.dtype)
    config.lam_dtype = provenance.dtype
    lam = provenance.lam
    another = source.trained_on is not None and source.fingerprint != lam.fingerprint
    return with_shape(
        source,
        lam,
        model_path=lam.path if source.model_path is None or another else source.model_path,
        camera_key=source.camera_key or policy_camera(config, provenance.camera_key, dataset_meta),
        fingerprint=lam.fingerprint,
    )


def _contradictions(
    config: DiffusionLamConfig, source: LamSource, tokens: TokenStore | TokenColumn, dataset_meta: Any
) -> list[str]:
    """Where fields that are set differ from what a store (or column) holds."""
    noun = "store" if isinstance(tokens, TokenStore) else "column"
    remedy = f": leave that flag out, or train on another {noun}"
    problems = []
    if config.lam_frame_stride not in (None, tokens.frame_stride):
        problems.append(
            f"--policy.lam_frame_stride is {config.lam_frame_stride}, the {noun} has "
            f"{tokens.frame_stride}{remedy}"
        )
    provenance = tokens.provenance
    if provenance is not None:
        lam = provenance.lam
        problems += lam_problems(config, source, lam, noun, remedy)
        if not config.lam_allow_mismatch:
            problems += _other_lam_named(source, lam.fingerprint, noun)
        if _is_other_camera(config, source.camera_key, provenance.camera_key, dataset_meta):
            problems.append(
                f"--policy.lam_camera_key is {source.camera_key}, the {noun} has "
                f"{provenance.camera_key}{remedy}"
            )
    elif tokens.token_dim != source.token_dim:
        problems.append(
            f"--policy.lam_num_learned_tokens * lam_action_latent_dim is {source.token_dim}, the {noun} has "
            f"{tokens.token_dim}{remedy}"
        )
    if config.lam_use_vq_tokens != (tokens.kind == VQ):
        flag = str(tokens.kind == VQ).lower()
        problems.append(
            f"it holds {tokens.kind} tokens: pass --policy.lam_use_vq_tokens={flag} or extract the other kind"
        )
    return problems


def _other_lam_named(source: LamSource, fingerprint: str, noun: str) -> list[str]:
    """Whether a fresh policy names another LAM for deployment; checked only if it is on this machine."""
    if source.fingerprint is not None or source.model_path is None or source.is_auto:
        return []
    named = local_fingerprint(source.model_path)
    if named is None or named == fingerprint:
        return []
    return [
        f"--policy.lam_model_path={source.model_path} has the fingerprint {named[:16]}…, the LAM of the "
        f"{noun} {fingerprint[:16]}…: leave that flag out, or train on a {noun} of that LAM"
    ]


def _is_other_camera(config: DiffusionLamConfig, key: str | None, camera: str, dataset_meta: Any) -> bool:
    """Whether `lam_camera_key` is certainly another camera than the dataset's `camera`.

    A `rename_map` can give the same camera another name; then the first batch shows it.
    """
    if key in (None, camera) or dataset_meta is None or may_be_exchanged(config, dataset_meta):
        return False
    return key in dataset_meta.camera_keys or key not in visible_cameras(config, dataset_meta)


def _warn_of_missing_lams(config: DiffusionLamConfig, dataset_meta: Any) -> None:
    """Training needs no LAM, an evaluation in an environment does: warn now, not at step 20,000."""
    if not config.past_token_deltas:
        return  # a guide gives its tokens
    reasons: dict[str, None] = {}  # each once
    for source in config.token_sources:
        path, reason = source.model_path, None
        if path is None:
            reason = "the LAM of these tokens is not known"
        elif path.startswith(("/", ".", "~")) and not Path(path).expanduser().exists():  # no Hub id begins so
            reason = f"the LAM of these tokens is not at {path}"
        elif source.camera_key is None:
            reason = "it is not known which of the policy's cameras the LAM looks at"
        found = [reason] if reason else camera_problems(config, [source.camera_key], dataset_meta)
        reasons |= dict.fromkeys(found)
    for reason in reasons:
        logger.warning(
            "%s. Training goes on; an evaluation in an environment (--env.type) and deployment need "
            "--policy.lam_model_path and --policy.lam_camera_key.",
            reason[0].upper() + reason[1:],
        )


def warn_of_pauses(dataset_meta: Any) -> None:
    """Warn about a recording whose adjacent rows may not be adjacent in time."""
    if "intervention" in dataset_meta.features:
        logger.warning(
            "Dataset %r has a column 'intervention', as DAgger recordings of lerobot-rollout have. If it was "
            "recorded with record_autonomous=true, its episodes go on over pauses that were not recorded: "
            "the token of the first frame after a pause is not motion. Without that flag each correction is "
            "an episode of its own, and all is well.",
            dataset_meta.repo_id,
        )
