"""Other people's checkpoints: opened without running their code, checked, and translated key by key."""

import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.utils.errors import LamError, first_line, raise_problems, shown
from lerobot_lam_diffusion.utils.files import UnreadableError, check_regular

Shape = tuple[int, ...]

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_EMA = "ema_model."
_PREFIXES = ("module.", "_orig_mod.", "lam.")  # data-parallel, compiled, UniVLA's trainer; anywhere in a key
_WHOLE = "Name the checkpoint of this architecture, whole."


@dataclass(frozen=True)
class Dims:
    """What a checkpoint does not tell of its model.

    Args:
        image_size: Side of the square that frames are resized to: 256 (LAPA), 224 (UniVLA) if left out.
        code_seq_len: LAPA: tokens of a pair; 4 if left out.
        num_heads: UniVLA: attention heads of the LAM's encoder; 12 if left out.
        dino_num_heads: UniVLA: attention heads of its DINOv2 tower; 12 if left out.
    """

    image_size: int | None = None
    code_seq_len: int | None = None
    num_heads: int | None = None
    dino_num_heads: int | None = None


@dataclass(frozen=True)
class Translation:
    """How a checkpoint's tensors become those of our modules.

    Attributes:
        config: The family's config, without its source.
        rules: Regular expressions and replacements that turn our keys into theirs, in this order.
        computed: Our keys that have no counterpart → function that computes the tensor from theirs.
        inputs: Their keys that only `computed` needs → shapes.
        unused: Regular expression of their keys that nothing needs.
        dropped: Our modules that are not kept.
    """

    config: Any
    rules: Sequence[tuple[str, str]]
    computed: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]]
    inputs: Mapping[str, Shape]
    unused: str
    dropped: tuple[str, ...] = ()

    def expected(self, ours: Mapping[str, Tensor]) -> dict[str, Shape]:
        """Every key of theirs that is needed → its shape, by the tensors of our modules."""
        translated = {self._theirs(key): tuple(ours[key].shape) for key in ours if key not in self.computed}
        return {**translated, **self.inputs}

    def state(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The content of `model.safetensors`."""
        kept = [key for key in ours if key.split(".")[0] not in self.dropped]
        return {
            key: self.computed[key](theirs) if key in self.computed else theirs[self._theirs(key)]
            for key in kept
        }

    def _theirs(self, key: str) -> str:
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


def open_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a `torch.save` file; nothing in the file is executed.

    Optimiser states and whatever else a trainer saved are left out; of a model with a moving average the
    average is taken; prefixes of wrappers are removed.

    Raises:
        LamError: not such a file, or it holds objects that only their own code could restore.
    """
    try:
        check_regular(path)
        document = _load(path)
    except (UnreadableError, OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError,
            pickle.UnpicklingError) as error:  # fmt: skip
        told = [line for line in str(error).splitlines() if "WeightsUnpickler error" in line]
        why = first_line(told[0] if told else error)
        raise LamError(
            f"{path} does not open with torch.load(weights_only=True) ({why}). Fetch it again: a file of "
            "some hundred bytes is a git-lfs pointer (`git lfs pull`). One that holds more than tensors "
            "could run code: if you trust it, save its state dict alone (torch.save(model.state_dict(), …))."
        ) from error
    return _renamed(_flat(document, path), path)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
    return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


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
    found = shown(document)
    if isinstance(document, Mapping):
        found = f"the keys {shown(sorted(map(str, document)))}"
    raise LamError(
        f"{path} holds {found}, expected a state dict, alone or under {', '.join(_WRAPPERS)}. Name the file "
        "of the LAM's weights."
    )


def _renamed(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors by their names in the model, without the prefixes of wrappers."""
    if any(_EMA in key for key in state):
        state = {key.replace(_EMA, ""): value for key, value in state.items() if _EMA in key}
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for prefix in _PREFIXES:
            key = key.replace(prefix, "")
        if key in renamed:
            raise LamError(
                f"{path} holds {shown(key)} twice, with and without a prefix, expected one model. Save the "
                "state dict of the one you mean alone."
            )
        renamed[key] = value
    return renamed


class Shapes:
    """The dimensions that the shapes of a checkpoint's tensors reveal."""

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
                f"{self._path}: {key} {found}, expected it to give the model's dimensions (missing key, or "
                f"another architecture). {_WHOLE}"
            )
        return tensor.shape[axis]

    def side(self, key: str, axis: int, per_place: int = 1) -> int:
        """Side of the square of places along an axis."""
        return math.isqrt(self.size(key, axis) // per_place)

    def depth(self, prefix: str) -> int:
        """How many numbered blocks there are below a prefix."""
        names = (key.removeprefix(f"{prefix}.") for key in self._state if key.startswith(f"{prefix}."))
        return len({name.split(".")[0] for name in names})


def check_tensors(
    path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Shape], unused: str
) -> None:
    """Refuse missing, unexpected, misshapen and damaged tensors.

    Args:
        expected, unused: See `Translation`.

    Raises:
        LamError: lists all of them.
    """
    problems = [
        f"missing key {key}, expected with shape {list(expected[key])}" for key in expected.keys() - state
    ]
    problems += [
        f"unexpected key {shown(key)} of shape {list(state[key].shape)}"
        for key in state.keys() - expected
        if not re.fullmatch(unused, key)
    ]
    for key in expected.keys() & state:
        tensor, shape = state[key], expected[key]
        if tuple(tensor.shape) != shape:
            problems.append(f"{key} has shape {list(tensor.shape)}, expected {list(shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{key} is stored as {tensor.dtype}, expected floating point")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key} holds NaN or Inf")
    raise_problems(
        f"{path} is not the checkpoint that its dimensions promise", sorted(problems), LamError, _WHOLE
    )
