"""The weights file of a model folder, opened once for its check, its hash and its tensors.

It is read, not mapped: a process that maps a file is killed (SIGBUS) when another one shortens it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lerobot_lam_diffusion.utils.errors import LamError, first_line
from lerobot_lam_diffusion.utils.files import UnreadableError, check_regular

from .config import CONFIG_FILE
from .locating import WEIGHTS_FILE


class Weights(NamedTuple):
    """An opened weights file.

    Attributes:
        shapes, dtypes: Of each key; dtypes by safetensors' names ("F32").
    """

    path: Path
    file: safe_open
    shapes: dict[str, list[int]]
    dtypes: dict[str, str]

    def tensor(self, key: str) -> Tensor:
        """A tensor in memory of its own.

        Raises:
            LamError: the file became shorter, or the disk fails.
        """
        try:
            return self.file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """The weights of a model folder; its header is checked, no tensor is read.

    Raises:
        LamError: absent, or no safetensors file.
    """
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise LamError(
            f"{path} does not exist, expected the weights beside {CONFIG_FILE}. "
            "Fetch the model again (with git: `git lfs pull`)."
        )
    try:
        check_regular(path)
        file = safe_open(path, framework="pt", backend="pread").__enter__()
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        shapes = {key: each.get_shape() for key, each in slices.items()}
        dtypes = {key: each.get_dtype() for key, each in slices.items()}
    except (UnreadableError, SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    with file:
        yield Weights(path, file, shapes, dtypes)


def _unreadable(path: Path, error: Exception) -> LamError:
    return LamError(
        f"{path} is no readable safetensors file ({first_line(error)}), expected the weights of a LAM. "
        "Fetch the model again; a file of some hundred bytes is a git-lfs pointer (`git lfs pull`)."
    )
