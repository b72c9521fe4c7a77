"""A dataset's own token column, and what the dataset says about it.

What defines the tokens (LAM, camera, stride, kind, …) is stored in the feature's `info` in `meta/info.json`,
which LeRobot's tools copy into every dataset that they make from this one. `merge_datasets` refuses features
that differ in anything, including `info`. So `info` holds nothing that differs between two datasets with the
same kind of tokens, and LeRobot itself refuses to mix the tokens of two LAMs.

What is specific to one dataset (its digest, everything else that its token store recorded, and how the
camera's video was encoded) is stored in `meta/lam_tokens.json`, which LeRobot's tools do not copy. If that
file is absent or no longer describes the dataset, the column is *derived*. Its rows still match their frames.

There is no list of missing tokens: they are the first `frame_stride` rows of each episode, which are zero.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot_lam_diffusion.tokens.binding import dataset_digest, has_digest, same_frames, video_info
from lerobot_lam_diffusion.tokens.provenance import FORMAT, NOT_RECORDED, DatasetInfo, Provenance
from lerobot_lam_diffusion.utils.errors import TokenStoreError
from lerobot_lam_diffusion.utils.files import DOCUMENT_BYTES, UnreadableError, read_json

COLUMN_FORMAT = "lerobot_lam_diffusion.token_column"
COLUMN_FORMAT_VERSION = 2  # a provenance version; the fields in `info` have not changed since
ORIGINS_FILE = Path("meta/lam_tokens.json")
IDENTITY = (
    "lam", "camera_key", "frame_stride", "stride_seconds", "context", "token_kind", "dtype", "storage_dtype",
)  # fmt: skip
AS_EXTRACTED = "its rows are as they were extracted"


@dataclass(frozen=True)
class TokenColumn:
    """What a dataset says about a token column.

    Attributes:
        key: Name of the column.
        provenance: What its tokens are; `dataset` is the dataset that has the column.
        derived: Why it is not known to hold exactly the tokens that a LAM made from these frames; None if it
            does.
        is_changed: Whether its own dataset has been modified, rather than only turned into another one.
    """

    key: str
    provenance: Provenance
    derived: str | None
    is_changed: bool = False

    @property
    def kind(self) -> str:
        return self.provenance.token_kind

    @property
    def frame_stride(self) -> int:
        return self.provenance.frame_stride

    @property
    def token_dim(self) -> int:
        return self.provenance.lam.num_learned_tokens * self.provenance.lam.action_latent_dim

    @property
    def state(self) -> str:
        """Human-readable: as extracted, or what changed since."""
        return AS_EXTRACTED if self.derived is None else f"derived: {self.derived}"


def column_info(provenance: Provenance) -> dict[str, Any]:
    """What the feature's `info` says about tokens of a store with this provenance."""
    document = json.loads(provenance.to_json())
    identity = {name: document[name] for name in IDENTITY}
    return {"format": COLUMN_FORMAT, "format_version": COLUMN_FORMAT_VERSION, **identity}


def read_column(meta: Any, key: str) -> TokenColumn | None:
    """What the dataset says about its column `key`; None where it says nothing.

    Args:
        meta: `LeRobotDatasetMetadata` of a dataset with that column.

    Raises:
        TokenStoreError: what it says is damaged, newer than this package, or not true of the column's shape.
    """
    info = meta.features[key].get("info")
    if not isinstance(info, dict) or info.get("format") != COLUMN_FORMAT:
        return None
    where = f"what {Path(meta.root) / 'meta' / 'info.json'} says about the column {key!r}"
    camera = info.get("camera_key")
    digest = dataset_digest(meta, camera if isinstance(camera, str) else "")
    here = DatasetInfo(meta.repo_id, None, meta.total_frames, meta.total_episodes, meta.fps, digest)
    unsaid = {**NOT_RECORDED, "versions": {}, "tensors_sha256": ""}
    document = {**unsaid, **info, "format": FORMAT, "dataset": dataclasses.asdict(here)}
    provenance = Provenance.from_document(document, where)
    column = TokenColumn(key, provenance, None)
    shape = tuple(meta.features[key]["shape"])
    if shape != (column.token_dim,):
        lam = provenance.lam
        raise TokenStoreError(
            f"{where} is damaged: tokens of {lam.num_learned_tokens} x {lam.action_latent_dim} numbers in a "
            f"column of shape {shape}. Add the column again with lerobot-lam-tokens add-column"
        )
    return _with_origin(column, meta)


def read_origins(root: str | Path) -> dict[str, Any]:
    """Map each column to its `origin_document`; empty if none can be read."""
    try:
        origins = read_json(Path(root) / ORIGINS_FILE, DOCUMENT_BYTES)
    except UnreadableError:
        return {}
    return origins if isinstance(origins, dict) else {}


def origin_document(provenance: Provenance, meta: Any) -> dict[str, Any]:
    """The `ORIGINS_FILE` entry about the store from which a column of the dataset `meta` is made."""
    return {"store": json.loads(provenance.to_json()), "video": video_info(meta, provenance.camera_key)}


def _with_origin(column: TokenColumn, meta: Any) -> TokenColumn:
    """The column with its full provenance, if its dataset is still the one it was made of."""
    document = read_origins(meta.root).get(column.key)
    if not isinstance(document, dict):
        return dataclasses.replace(
            column,
            derived=f"{ORIGINS_FILE} says nothing about it, so the dataset was made of the extracted one",
        )
    try:
        recorded = Provenance.from_document(document.get("store"), str(Path(meta.root) / ORIGINS_FILE))
    except TokenStoreError as error:
        return dataclasses.replace(column, derived=str(error))
    video = document.get("video")
    same = same_frames(meta, recorded.camera_key, recorded.dataset)
    same_digest = has_digest(meta, recorded.camera_key, recorded.dataset.digest, video)
    encoded_again = video != video_info(meta, recorded.camera_key)
    if not (same_digest if same is None else same or (same_digest and encoded_again)):
        reason = f"the dataset's episodes are no longer those of {recorded.dataset.repo_id!r}"
    elif encoded_again and not same:
        reason = f"the video of {recorded.camera_key} was encoded again"
    elif column_info(recorded) != column_info(column.provenance):
        reason = f"{ORIGINS_FILE} contradicts the column's info"
    else:
        return dataclasses.replace(column, provenance=recorded)
    return dataclasses.replace(column, derived=reason, is_changed=True)
