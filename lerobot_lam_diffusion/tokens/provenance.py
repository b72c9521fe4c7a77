"""`lam_tokens.json`: what a store's tokens are, of which frames, made by which LAM."""

import dataclasses
import json
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from lerobot_lam_diffusion.utils.errors import TokenStoreError, shown
from lerobot_lam_diffusion.utils.files import UnreadableError, read_json

FORMAT = "lerobot_lam_diffusion.token_store"
FORMAT_VERSION = 3
PACKAGE = "lerobot_policy_diffusion_lam"

VQ = "vq"
CONTINUOUS = "continuous"
KINDS = (VQ, CONTINUOUS)
VQ_STORAGE = ("uint8", "uint16")
CONTINUOUS_STORAGE = ("float32", "float16", "bfloat16", "int8")
UNKNOWN_DEVICE = "unknown"
UNKNOWN_DECODER = "unknown"
NOT_RECORDED = {"max_error": 0.0, "device": UNKNOWN_DEVICE, "decoder": UNKNOWN_DECODER, "skipped": {}}
"""Fields as they are where nothing is known of them: in format version 1, and in a column's info."""
DOCUMENT_BYTES = 1 << 23  # it lists each episode that could not be read
NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
PAIR_CONTEXT = "pair"
VIDEOS = "videos/"
"""Prefix of a store's dataset name if the dataset is a folder of videos."""

NAMES_ONLY = {
    "dataset.repo_id", "dataset.revision", "dataset.frames", "lam.path", "lam.revision", "versions",
    "tensors_sha256", "max_error", "skipped",
}  # fmt: skip
"""Fields that may differ between two extractions of the same tokens. Frames are compared by episode, since a
file that could not be read may have been repaired meanwhile."""

DERIVED = {
    "stride_seconds", "lam.num_learned_tokens", "lam.action_latent_dim", "lam.num_codes", "lam.token_scale",
}  # fmt: skip
"""Fields that follow from others: from stride and fps, or from the LAM's fingerprint."""

OF_THE_DATASET = {"dataset.total_frames", "dataset.total_episodes", "dataset.digest"}
"""Identity fields that may differ between a dataset and an earlier version of it."""


@dataclass(frozen=True)
class DatasetInfo:
    """The dataset whose frames the LAM looked at.

    `digest` is a digest of its statistics, see `binding.dataset_digest`. `frames` is a digest of the frames
    themselves, see `frames_digest.frames_digest`; it is empty before format version 3, or if any of the files
    was missing.
    """

    repo_id: str
    revision: str | None
    total_frames: int
    total_episodes: int
    fps: float
    digest: str
    frames: str = ""


@dataclass(frozen=True)
class LamInfo:
    """The LAM that made the tokens, and their shape.

    `token_scale` is the RMS of the codebook's entries, `num_codes` its K rows; of a LAM without a codebook,
    `num_codes` is 0 and the LAM itself tells its scale.
    """

    path: str
    revision: str | None
    fingerprint: str
    num_learned_tokens: int
    action_latent_dim: int
    num_codes: int
    token_scale: float


@dataclass(frozen=True)
class Provenance:
    """The identity of a store's tokens.

    Args:
        dataset: Which frames.
        lam: Which LAM.
        camera_key: The dataset's name of the camera.
        frame_stride: Offset between the frames of a pair; `stride_seconds`: the same in seconds.
        context: How many frames the LAM saw for a token; "pair": the two of the pair.
        token_kind: "vq" (codebook rows) or "continuous" (vectors before quantisation).
        dtype: Compute dtype of the encoder; the quantiser always ran in float32.
        versions: Packages that made the store.
        tensors_sha256: SHA-256 of `lam_tokens.safetensors`.
        storage_dtype: How rows are stored (see `storage.py`); chosen by the writer.
        max_error: Largest absolute difference between a number passed to the writer and the one read back.
        device: Type of device that the LAM ran on: "cpu", "cuda", "mps"; "unknown" in format version 1.
        decoder: How pixels were read from the files: "pyav", "torchcodec" (they may differ by one intensity
            level) or "images"; "unknown" in format version 1.
        skipped: Episodes that extraction could not read: number → reason. The store does not cover them.
    """

    dataset: DatasetInfo
    lam: LamInfo
    camera_key: str
    frame_stride: int
    stride_seconds: float
    token_kind: str
    dtype: str
    versions: dict[str, str]
    tensors_sha256: str = ""
    context: str = PAIR_CONTEXT
    storage_dtype: str = ""
    max_error: float = 0.0
    device: str = UNKNOWN_DEVICE
    decoder: str = UNKNOWN_DECODER
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What decides a token, flat: `{"dataset.digest": …, "lam.fingerprint": …, "camera_key": …, …}`.

        Equal identities mean equal tokens. A field that is added to the provenance counts unless it is
        listed in `NAMES_ONLY` or `DERIVED`.
        """
        flat: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            nested = isinstance(value, dict) and name in ("dataset", "lam")
            flat |= {f"{name}.{key}": item for key, item in value.items()} if nested else {name: value}
        return {name: value for name, value in flat.items() if name not in NAMES_ONLY | DERIVED}

    def differences(self, expected: "Provenance", ignore: Collection[str] = ()) -> list[str]:
        """How the identity differs from the expected one: `frame_stride is 1, expected 2`; empty if equal."""
        other = expected.identity()
        return [
            f"{name} is {shown(value)}, expected {shown(other[name])}"
            for name, value in self.identity().items()
            if value != other[name] and name not in ignore
        ]

    def to_json(self) -> str:
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Provenance":
        """Read and check a provenance file, of this format version or an older one.

        Raises:
            TokenStoreError: it is not JSON, not ours, newer than this package, or fields are missing or of
                the wrong type (the first of them is named).
        """
        try:
            document = read_json(path, DOCUMENT_BYTES)
        except UnreadableError as error:
            raise TokenStoreError(
                f"{path} is not readable as JSON ({error}); extract the tokens again with "
                "lerobot-lam-precompute"
            ) from error
        return cls.from_document(document, str(path))

    @classmethod
    def from_document(cls, document: Any, name: str) -> "Provenance":
        """Check a provenance that was read as JSON.

        Args:
            name: What to call it in error messages.

        Raises:
            TokenStoreError: as for `read`.
        """
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise TokenStoreError(
                f'{name} does not describe a token store: expected "format": "{FORMAT}"; extract the tokens '
                "again with lerobot-lam-precompute"
            )
        _refuse_newer(document, name)
        document = _upgraded(document)
        try:
            provenance = _decode(cls, document)
            _check_values(provenance)
        except ValueError as error:
            raise TokenStoreError(
                f"{name} is damaged: {error}. Extract the tokens again with lerobot-lam-precompute"
            ) from error
        return provenance


def refuse_other_lam(name: str, expected: LamInfo, lam: Any) -> None:
    """Refuse a LAM that did not make the tokens `name`.

    Raises:
        TokenStoreError: its fingerprint is another.
    """
    if lam.fingerprint != expected.fingerprint:
        raise TokenStoreError(
            f"{name} was made by the LAM {expected.path!r} with fingerprint {expected.fingerprint[:16]}…, "
            f"this LAM has {lam.fingerprint[:16]}…; pass the LAM that made it as --lam.path"
        )


def _refuse_newer(document: dict, name: str) -> None:
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise TokenStoreError(
            f"{name} is damaged: format_version is {shown(version)}, expected a positive integer. Extract "
            "the tokens again with lerobot-lam-precompute"
        )
    if version > FORMAT_VERSION:
        raise TokenStoreError(
            f"{name} has format version {shown(version)}; this {PACKAGE} reads versions up to "
            f"{FORMAT_VERSION}. Install a newer one: pip install --upgrade {PACKAGE}"
        )


def _upgraded(document: dict) -> dict:
    """Add to an older document the fields that later format versions introduced."""
    dataset = document.get("dataset")
    if document["format_version"] < 3 and isinstance(dataset, dict):
        document = {**document, "dataset": {**dataset, "frames": ""}}
    if document["format_version"] > 1:
        return document
    lam = document.get("lam")
    num_codes = lam.get("num_codes") if isinstance(lam, dict) else None
    wide = isinstance(num_codes, int) and num_codes > 256
    storage = VQ_STORAGE[wide] if document.get("token_kind") == VQ else "float32"
    return {**document, **NOT_RECORDED, "storage_dtype": storage}


def _decode(kind: type, document: Any, prefix: str = "") -> Any:
    """Build dataclass `kind` from a JSON object.

    Raises:
        ValueError: a field is missing or of another type.
    """
    if not isinstance(document, dict):
        raise ValueError(f"{prefix.rstrip('.')} is not an object")
    values = {}
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if field.name not in document:
            raise ValueError(f"{name} is missing")
        value = document[field.name]
        if dataclasses.is_dataclass(field.type):
            assert isinstance(field.type, type)
            value = _decode(field.type, value, f"{name}.")
        elif not _has_type(value, field.type):
            expected = field.type.__name__ if isinstance(field.type, type) else field.type
            raise ValueError(f"{name} is {shown(value)}, expected {expected}")
        values[field.name] = value
    return kind(**values)


def _has_type(value: Any, expected: Any) -> bool:
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if expected is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max
    if expected == dict[str, str]:
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    return isinstance(value, expected)


def _check_values(provenance: Provenance) -> None:
    """Raise a ValueError for the first field whose value no store has."""
    is_vq = provenance.token_kind == VQ
    total_episodes = provenance.dataset.total_episodes
    checks = [
        ("token_kind", provenance.token_kind in KINDS),
        ("frame_stride", 0 < provenance.frame_stride < 2**63),
        ("lam.num_learned_tokens", 0 < provenance.lam.num_learned_tokens < 2**63),
        ("lam.action_latent_dim", 0 < provenance.lam.action_latent_dim < 2**63),
        ("lam.num_codes", (1 if is_vq else 0) <= provenance.lam.num_codes < 2**63),
        ("lam.token_scale", provenance.lam.token_scale > 0),
        ("dataset.total_frames", 0 < provenance.dataset.total_frames < 2**63),
        ("dataset.total_episodes", 0 < total_episodes < 2**63),
        ("storage_dtype", provenance.storage_dtype in (VQ_STORAGE if is_vq else CONTINUOUS_STORAGE)),
        ("max_error", provenance.max_error >= 0),
        ("skipped", all(NUMBER.fullmatch(key) and int(key) < total_episodes for key in provenance.skipped)),
    ]
    for field, is_fine in checks:
        if not is_fine:
            raise ValueError(f"{field} is {shown(attrgetter(field)(provenance))}, which no store has")
