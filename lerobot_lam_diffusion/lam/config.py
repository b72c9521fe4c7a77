"""`model_config.json`: which architecture a LAM folder holds, and its dimensions."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, get_args, get_type_hints

from lerobot_lam_diffusion.reading import UnreadableError, read_json, shown

from .errors import LamError, problems_to_error

CONFIG_FILE = "model_config.json"
CONFIG_REMEDY = "Correct the file, or fetch the model folder again."

# Far beyond any LAM, and small enough that no product of a few of them overflows: the file may be damaged.
_LARGEST = 1 << 20


class TokenShape(Protocol):
    """What a loaded LAM and its config both tell without computing anything."""

    @property
    def num_learned_tokens(self) -> int:
        """Slots n per frame pair."""

    @property
    def action_latent_dim(self) -> int:
        """Width a of one slot."""

    @property
    def num_codes(self) -> int:
        """Codebook rows K; 0: there is no codebook, tokens are continuous only."""

    @property
    def stride_seconds(self) -> float | None:
        """Seconds between the frames of a pair that the LAM was trained on, if that is known."""


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """The `config` object of a LAM; a family adds its own dimensions as further fields.

    Fields are integers (positive, unless their default is 0), floats, booleans or text. Text describes the
    model and decides no token; every other field does, `stride_seconds` aside.

    Args:
        num_learned_tokens: Slots n per frame pair.
        action_latent_dim: Width a of one slot.
        n_codes: Codebook rows K; 0: no codebook.
        token_scale: What a policy divides tokens by where there is no codebook; else the codebook's RMS is.
        stride_seconds: Seconds between the frames of a pair that the LAM was trained on.

    Raises:
        LamError: if a value is of the wrong type or out of range; all problems at once.
    """

    num_learned_tokens: int
    action_latent_dim: int
    n_codes: int = 0
    token_scale: float = 1.0
    stride_seconds: float | None = None

    def __post_init__(self) -> None:
        problems = self._type_problems() or self.problems()
        if problems:
            raise problems_to_error("These LAM dimensions do not describe a model", problems, CONFIG_REMEDY)

    def problems(self) -> list[str]:
        """What is wrong with the values, once their types are right. For a family to extend."""
        return []

    @property
    def num_codes(self) -> int:
        return self.n_codes

    @property
    def token_dim(self) -> int:
        """Width n·a of the flattened token of a frame pair."""
        return self.num_learned_tokens * self.action_latent_dim

    def to_dict(self) -> dict[str, Any]:
        """The `config` object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a `config` object: unknown keys are ignored, missing ones take their defaults."""
        fields = dataclasses.fields(cls)
        missing = [
            f"{field.name} is missing"
            for field in fields
            if field.name not in values and field.default is dataclasses.MISSING
        ]
        if missing:
            raise problems_to_error("These LAM dimensions do not describe a model", missing, CONFIG_REMEDY)
        return cls(**{field.name: values[field.name] for field in fields if field.name in values})

    def token_fields(self, architecture: str) -> dict[str, Any]:
        """What enters the fingerprint besides the weights: all that decides a token."""
        hints = get_type_hints(type(self))
        described = {name for name, kind in hints.items() if str in (kind, *get_args(kind))}
        values = {key: v for key, v in self.to_dict().items() if key not in described | {"stride_seconds"}}
        return {"architecture": architecture, **values}

    def _type_problems(self) -> list[str]:
        hints = get_type_hints(type(self))
        problems = []
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), get_args(hints[field.name]) or (hints[field.name],)
            least = field.metadata.get("least", 0 if field.default == 0 else 1)
            if value is None and type(None) in kinds:
                continue
            if int in kinds:
                if type(value) is not int or not least <= value <= _LARGEST:
                    problems.append(
                        f"{field.name} is {shown(value)}, expected an integer from {least} to {_LARGEST}"
                    )
            elif float in kinds:
                if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
                    problems.append(f"{field.name} is {shown(value)}, expected a positive number")
            elif not isinstance(value, kinds):
                names = " or ".join(kind.__name__ for kind in kinds)
                problems.append(f"{field.name} is {shown(value)}, expected {names}")
        return problems


def read_document(folder: Path) -> dict[str, Any]:
    """Read `model_config.json` of a model folder.

    Raises:
        LamError: if the file is absent or not an object that holds an object `config`.
    """
    path = folder / CONFIG_FILE
    try:
        document = read_json(path)
    except UnreadableError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise LamError(
                f"{path} does not exist. A LAM folder holds {CONFIG_FILE} and model.safetensors: "
                "point to that folder, or fetch the model again."
            ) from None
        raise LamError(
            f"{path} could not be read ({error}), expected a JSON object. {CONFIG_REMEDY}"
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("config", {}), dict):
        raise LamError(
            f"{path} holds no JSON object with an object `config`, expected the keys architecture, "
            f"description, version and config. {CONFIG_REMEDY}"
        )
    return document


def config_document(
    architecture: str, config: dict[str, Any], description: str = "", version: int = 0
) -> str:
    """The text of a `model_config.json`."""
    document = {
        "architecture": architecture,
        "description": description,
        "version": version,
        "config": config,
    }
    return json.dumps(document, indent=2) + "\n"
