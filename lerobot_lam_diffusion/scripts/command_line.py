"""What our command lines share: LeRobot's flags, the dash-spelled ones, and errors without a traceback.

draccus itself takes `--dataset.repo_id=x`; it knows neither `--dataset-repo-id x` nor `--episodes 0 1 2`.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import draccus

from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.scripts.help import Command

DASHED = {
    "--dataset-repo-id": "dataset.repo_id",
    "--dataset-root": "dataset.root",
    "--episodes": "dataset.episodes",
    "--lam-model-path": "lam.path",
    "--lam-revision": "lam.revision",
    "--camera-key": "camera_key",
    "--frame-stride": "frame_stride",
    "--output-dir": "output_dir",
    "--batch-size": "batch_size",
    "--learning-rate": "learning_rate",
    "--config-path": "config_path",
}
SWITCHES = {"--no-vq-tokens": "--use_vq_tokens=false", "--vq-tokens": "--use_vq_tokens=true"}
LISTS = {"dataset.episodes"}


@dataclass
class LamSource:
    """Which LAM.

    Args:
        path: Folder (`model_config.json` + `model.safetensors`), shipped name (`pusht-compact`) or Hub id.
        revision: Commit, branch or tag of a Hub id.
    """

    path: str
    revision: str | None = None


def run_command(
    config_class: type,
    command: Callable[[Any], None],
    argv: Sequence[str] | None = None,
    told: Command | None = None,
) -> None:
    """Parse the command line into `config_class` and run `command` on it; `told` answers `--help`.

    Exits with status 1 and one message where the input is bad, and 130 after an interrupt.
    """
    logging.getLogger("lerobot.utils.import_utils").addFilter(_without_traceback)
    arguments = normalise(sys.argv[1:] if argv is None else argv)
    if told is not None and {"-h", "--help"} & set(arguments):
        print(told.help(), end="")
        sys.exit(0)
    try:
        command(draccus.parse(config_class, args=arguments))
    except (UserError, OSError, draccus.ParsingError) as error:
        cause = _told_by(error)
        more = getattr(cause, "__notes__", [UserError.pointer()])
        if told is not None and isinstance(cause, draccus.ParsingError):
            more = [f"The flags: {told.name} --help"]
        sys.exit("\n".join([f"error: {cause}", *more]))
    except KeyboardInterrupt:
        sys.exit(130)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Where FFmpeg is missing, LeRobot logs a page on torchcodec, then one line that says it uses PyAV."""
    return "libtorchcodec" not in record.getMessage()


def _told_by(error: BaseException) -> BaseException:
    """The error that says what is wrong: draccus wraps what a config's own checks raise."""
    while type(error) is draccus.ParsingError and error.__cause__ is not None:
        error = error.__cause__
    return error


def normalise(argv: Sequence[str]) -> list[str]:
    """Arguments as draccus takes them: dashed names dotted, lists as `[0,1,2]`."""
    arguments: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        field = DASHED.get(name, name.removeprefix("--"))
        if word in SWITCHES:
            arguments.append(SWITCHES[word])
        elif field in LISTS and not value.startswith("["):
            values = value.split() if equals else []
            while rest and not rest[0].startswith("--"):
                values += rest.pop(0).split()
            arguments.append(f"--{field}={_as_list(values)}")
        elif name in DASHED:
            arguments.append(f"--{field}={value if equals else _value_of(name, rest)}")
        else:
            arguments.append(word)
    return arguments


def _as_list(values: list[str]) -> str:
    return "[" + ",".join(value.strip("[],") for value in values) + "]"


def _value_of(flag: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        sys.exit(f"error: {flag} needs a value")
    return rest.pop(0)
