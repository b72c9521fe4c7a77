"""`model_config.json`: which architecture a LAM folder holds, and its dimensions."""

from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

from lerobot_lam_diffusion.utils.errors import LamError, raise_problems, shown
from lerobot_lam_diffusion.utils.files import UnreadableError, read_json

CONFIG_FILE = "model_config.json"

_REMEDY = "Correct the file, or fetch the model folder again."
_UNFIT = "These LAM dimensions do not describe a model"
_LARGEST = 1 << 16  # far beyond any LAM; the file may be damaged
_DEEPEST = 128  # blocks, which are built before their weights are read


class ModelConfig:
    """Base of the config dataclasses of all families: checked fields and conversion to and from JSON.

    Fields annotated as integers must be positive (or at least 0 if their default is 0 or their metadata set
    `least` to 0), and those named `…_depth` or `…_blocks` at most 128; floats must be positive; `Any` is not
    checked.

    Raises:
        LamError: a value is of the wrong type or out of range; lists all problems.
    """

    num_learned_tokens: int
    action_latent_dim: int
    n_codes: int

    def __post_init__(self) -> None:
        raise_problems(_UNFIT, self._type_problems() or self.problems(), LamError, _REMEDY)

    def problems(self) -> list[str]:
        """What is wrong with values of the right types. Families extend it."""
        return []

    def not_multiples(self, *pairs: tuple[str, str]) -> list[str]:
        """The problems of fields that must be a multiple of another field."""
        values = vars(self)
        return [
            f"{name} is {values[name]}, expected a multiple of {other}, which is {values[other]}"
            for name, other in pairs
            if values[name] % values[other]
        ]

    @property
    def num_codes(self) -> int:
        """Codebook rows K; 0: there is no codebook, tokens are continuous only."""
        return self.n_codes

    @property
    def token_dim(self) -> int:
        """Width n·a of the flattened token of a frame pair."""
        return self.num_learned_tokens * self.action_latent_dim

    def to_dict(self) -> dict[str, Any]:
        """The `config` object."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a `config` object: unknown keys are ignored, missing ones take their defaults."""
        own = fields(cls)  # type: ignore[arg-type]
        missing = [f"{f.name} is missing" for f in own if f.name not in values and f.default is MISSING]
        raise_problems(_UNFIT, missing, LamError, _REMEDY)
        return cls(**{f.name: values[f.name] for f in own if f.name in values})

    def _type_problems(self) -> list[str]:
        hints = get_type_hints(type(self))
        problems = []
        for each in fields(self):  # type: ignore[arg-type]
            value, kinds = getattr(self, each.name), get_args(hints[each.name]) or (hints[each.name],)
            if Any in kinds or (value is None and type(None) in kinds):
                continue
            least = each.metadata.get("least", 0 if each.default == 0 else 1)
            if int in kinds:
                most = _DEEPEST if each.name.endswith(("_depth", "_blocks")) else _LARGEST
                fits = type(value) is int and least <= value <= most
                expected = f"an integer from {least} to {most}"
            elif float in kinds:
                fits = type(value) in (int, float) and 0 < value <= _LARGEST  # not NaN
                expected = f"a positive number up to {_LARGEST}"
            else:
                fits = isinstance(value, kinds)
                expected = " or ".join(kind.__name__ for kind in kinds)
            if not fits:
                problems.append(f"{each.name} is {shown(value)}, expected {expected}")
        return problems


@dataclass(frozen=True, kw_only=True)
class TokenConfig(ModelConfig):
    """The `config` object of a LAM; a family adds its own dimensions as further fields.

    Fields are integers, floats, booleans or text, and are checked (see `ModelConfig`). Text describes the
    model and does not determine its tokens; every other field does, except `stride_seconds`.

    Args:
        num_learned_tokens: Slots n per frame pair.
        action_latent_dim: Width a of one slot.
        n_codes: Codebook rows K; 0: no codebook.
        token_scale: What a policy divides tokens by if there is no codebook; else it is the codebook's RMS.
        stride_seconds: Seconds between the frames of a training pair.
    """

    num_learned_tokens: int
    action_latent_dim: int
    n_codes: int = 0
    token_scale: float = 1.0
    stride_seconds: float | None = None

    def token_fields(self, architecture: str) -> dict[str, Any]:
        """What enters the fingerprint besides the weights: all that determines a token."""
        hints = get_type_hints(type(self))
        text = {name for name, kind in hints.items() if str in (kind, *get_args(kind))}
        values = {key: v for key, v in self.to_dict().items() if key not in text | {"stride_seconds"}}
        return {"architecture": architecture, **values}


@dataclass(frozen=True, kw_only=True)
class ConvertedConfig(TokenConfig):
    """The `config` object of a LAM that was converted from a published checkpoint.

    Args:
        source_file, source_sha256, source_repository, source_revision, licence: The checkpoint.
    """

    source_file: str | None = None
    source_sha256: str | None = None
    source_repository: str | None = None
    source_revision: str | None = None
    licence: str | None = None


def read_document(folder: Path) -> dict[str, Any]:
    """Read `model_config.json` of a model folder.

    Raises:
        LamError: the file is absent or not an object that holds an object `config`.
    """
    path = folder / CONFIG_FILE
    try:
        document = read_json(path)
    except UnreadableError as error:
        raise LamError(f"{path} could not be read ({error}), expected a JSON object. {_REMEDY}") from error
    if not isinstance(document, dict) or not isinstance(document.get("config", {}), dict):
        raise LamError(
            f"{path} holds no JSON object with an object `config`, expected the keys architecture, "
            f"description, version and config. {_REMEDY}"
        )
    return document
