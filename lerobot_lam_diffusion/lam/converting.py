"""What translating a published checkpoint takes: opening it safely, and telling all that is wrong at once."""

import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.reading import UnreadableError, open_regular, shown

from .errors import LamError, problems_to_error

Shape = tuple[int, ...]

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_EMA = "ema_model."
_NOISE = ("module.", "_orig_mod.")  # of data-parallel and of compiled modules, anywhere in a key
_MOST_TOLD = 30
_NAMES_CODE = re.compile(r"GLOBAL|[Uu]nsupported (global|class)|Trying to (load|instantiate|call)")


@dataclass(frozen=True)
class Dims:
    """What a checkpoint does not tell of its model; None: as in the published weights."""

    image_size: int | None = None
    code_seq_len: int | None = None
    num_heads: int | None = None
    dino_num_heads: int | None = None


@dataclass(frozen=True)
class Translation:
    """A checkpoint's weights in our scheme.

    Attributes:
        config: The family's config, without what the source is.
        expected: The original key of every tensor → its shape.
        state: Makes the content of `model.safetensors` of the original tensors.
    """

    config: Any
    expected: dict[str, Shape]
    state: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def open_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a `torch.save` file; nothing in the file is executed.

    Optimiser states and whatever else a trainer saved are left out; of a model with a moving average the
    average is taken; prefixes of wrappers are removed.

    Raises:
        LamError: not such a file, or it holds objects that only their own code could restore.
    """
    try:
        open_regular(path).close()
        document = _load(path)
    except pickle.UnpicklingError as error:
        named = str(error)
        if _NAMES_CODE.search(named):
            raise LamError(
                f"{path} holds more than tensors ({_line(named)}), expected a checkpoint that opens with "
                "torch.load(weights_only=True): opening it would run code out of the file. Where you trust "
                "it, save its state dict alone: torch.save(model.state_dict(), 'weights.pt')."
            ) from error
        raise _unreadable(path, named) from error
    except (UnreadableError, OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise _unreadable(path, str(error) or type(error).__name__) from error
    return _named(_flat(document, path), path)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
    return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def _unreadable(path: Path, reason: str) -> LamError:
    return LamError(
        f"{path} is no readable checkpoint ({_line(reason)}), expected what torch.save writes. Fetch it "
        "again; a file of some hundred bytes is a git-lfs pointer (`git lfs pull`)."
    )


def _line(text: str) -> str:
    useful = [line.strip() for line in text.splitlines() if _NAMES_CODE.search(line)]
    line = (useful or text.splitlines() or ["it cannot be parsed"])[0].strip()
    return line if len(line) <= 200 else f"{line[:199]}…"


def _flat(document: Any, path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors inside what a trainer saved."""
    for _ in range(3):
        if not isinstance(document, Mapping):
            break
        if any(isinstance(value, Tensor) for value in document.values()):
            return {key: value for key, value in document.items() if isinstance(value, Tensor)}
        inner = [name for name in _WRAPPERS if isinstance(document.get(name), Mapping)]
        if not inner:
            break
        document = document[inner[0]]
    found = (
        f"the keys {shown(sorted(map(str, document)))}" if isinstance(document, Mapping) else shown(document)
    )
    raise LamError(
        f"{path} holds {found}, expected a state dict, alone or under {', '.join(_WRAPPERS)}. Name the file "
        "of the LAM's weights."
    )


def _named(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors by their names in the model."""
    if any(_EMA in key for key in state):
        state = {key.replace(_EMA, ""): value for key, value in state.items() if _EMA in key}
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for noise in _NOISE:
            name = name.replace(noise, "")
        if name in renamed:
            raise LamError(
                f"{path} holds {shown(name)} twice, with and without a prefix, expected one model. Save the "
                "state dict of the one you mean alone."
            )
        renamed[name] = value
    return renamed


def check_tensors(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> None:
    """Refuse missing, unexpected, misshapen and damaged tensors, all of them at once.

    Raises:
        LamError: one line a problem.
    """
    problems = [
        f"missing key {key}, expected with shape {list(shape)}"
        for key, shape in expected.items()
        if key not in state
    ]
    problems += [
        f"unexpected key {shown(key)} of shape {list(state[key].shape)}"
        for key in sorted(state.keys() - expected.keys())
    ]
    for key in expected.keys() & state.keys():
        tensor, shape = state[key], expected[key]
        if tuple(tensor.shape) != shape:
            problems.append(f"{key} has shape {list(tensor.shape)}, expected {list(shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{key} is stored as {tensor.dtype}, expected floating point")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key} holds NaN or Inf")
    rest = len(problems) - _MOST_TOLD
    if rest > 0:
        problems = [*problems[:_MOST_TOLD], f"… and {rest} more"]
    if problems:
        raise problems_to_error(
            f"{path} is not the checkpoint that its dimensions promise",
            problems,
            "Name the checkpoint of this architecture, whole.",
        )


class Shapes:
    """Shapes of a checkpoint's tensors, asked for by what they tell of its dimensions."""

    def __init__(self, path: Path, state: Mapping[str, Tensor]) -> None:
        self._path, self._state = path, state

    def size(self, key: str, axis: int) -> int:
        """Length of one axis of a tensor.

        Raises:
            LamError: it is not there, or has no such axis.
        """
        tensor = self._state.get(key)
        if tensor is None or tensor.ndim <= axis:
            found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
            raise LamError(
                f"{self._path}: {key} {found}, expected it to tell the model's dimensions (missing key, or "
                "another architecture). Name the checkpoint of this architecture, whole."
            )
        return tensor.shape[axis]

    def side(self, key: str, axis: int, per_place: int = 1) -> int:
        """Side of the square of places along an axis."""
        return math.isqrt(self.size(key, axis) // per_place)

    def depth(self, prefix: str) -> int:
        """How many numbered blocks there are below a prefix."""
        names = (key.removeprefix(f"{prefix}.") for key in self._state if key.startswith(f"{prefix}."))
        return len({name.split(".")[0] for name in names})
