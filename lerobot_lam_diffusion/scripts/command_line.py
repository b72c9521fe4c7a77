"""What our command lines share: LeRobot's flags, the dash-spelled ones, and errors without a traceback.

draccus itself takes `--dataset.repo_id=x`; it knows neither `--dataset-repo-id x` nor `--episodes 0 1 2`.
"""

import argparse
import difflib
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import draccus
import torch
import yaml
from draccus.utils import DraccusException
from lerobot.utils.device_utils import auto_select_torch_device

from lerobot_lam_diffusion.scripts.help import Command, is_union
from lerobot_lam_diffusion.utils.errors import FlagError, UserError, first_line

if TYPE_CHECKING:
    from lerobot_lam_diffusion.lam import LatentActionModel

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
    "--keep-fdm": "keep_fdm",
    "--image-size": "dims.image_size",
    "--code-seq-len": "dims.code_seq_len",
    "--num-heads": "dims.num_heads",
    "--dino-num-heads": "dims.dino_num_heads",
}
SWITCHES = {"--no-vq-tokens": "--use_vq_tokens=false", "--vq-tokens": "--use_vq_tokens=true"}
LISTS = {"dataset.episodes"}
VIDEO_BACKENDS = ("torchcodec", "pyav", "video_reader")


@dataclass
class DatasetSource:
    """Which dataset. Of LeRobot's `DatasetConfig` the fields that say so; importing that takes many seconds.

    Args:
        repo_id: The LeRobot dataset, user/name.
        root: Its folder, if it is not in LeRobot's home ($HF_LEROBOT_HOME).
        episodes: Only these, [0,1,2]; all if left out.
        revision: Of a dataset on the Hub: branch, tag or commit.
        video_backend: torchcodec or pyav; torchcodec where it works, if left out.
    """

    repo_id: str
    root: str | None = None
    episodes: list[int] | None = None
    revision: str | None = None
    video_backend: str | None = None

    def problems(self) -> list[str]:
        """What is wrong with the flags themselves."""
        problems = []
        if self.episodes == []:
            problems.append("--dataset.episodes is empty; name at least one, or leave it out for all")
        elif self.episodes is not None and (
            min(self.episodes) < 0 or len(set(self.episodes)) < len(self.episodes)
        ):
            problems.append(f"--dataset.episodes={self.episodes} must be distinct, none of them negative")
        if self.video_backend not in (None, *VIDEO_BACKENDS):
            problems.append(
                f"--dataset.video_backend={self.video_backend} must be {' or '.join(VIDEO_BACKENDS)}"
            )
        return problems


@dataclass
class LamFlags:
    """Which LAM.

    Args:
        path: Folder (`model_config.json` + `model.safetensors`), shipped name (`pusht-compact`) or Hub id.
        revision: Commit, branch or tag of a Hub id.
    """

    path: str
    revision: str | None = None

    def load(self, device: str | None, dtype: str = "float32", fdm: bool = False) -> "LatentActionModel":
        """The LAM; `device` None: the best there is."""
        from lerobot_lam_diffusion.lam import load_lam

        return load_lam(
            self.path,
            revision=self.revision,
            device=usable_device(device),
            dtype=getattr(torch, dtype),
            fdm=fdm,
        )


def run_command(
    config_class: type,
    command: Callable[[Any], None],
    argv: Sequence[str] | None = None,
    spec: Command | None = None,
) -> None:
    """Parse the command line into `config_class` and run `command` on it; `spec` provides `--help`.

    Bad input exits with a single message: status 2 if a flag is unknown, missing or cannot be parsed,
    otherwise 1. An interrupt exits with status 130.
    """
    spec = spec or Command(Path(sys.argv[0]).name, config_class, "")
    logging.getLogger("lerobot.utils.import_utils").addFilter(_without_traceback)
    try:
        arguments = normalise(sys.argv[1:] if argv is None else argv)
        if {"-h", "--help"} & set(arguments):
            print(spec.help(), end="")
            sys.exit(0)
        arguments = _quoted(arguments, spec)
        _refuse_missing_config(arguments)
        command(_at_home(draccus.parse(config_class, args=arguments, exit_on_error=False)))
    except yaml.YAMLError as error:
        refuse(_unreadable(arguments, error, spec))
    except (UserError, OSError, DraccusException, argparse.ArgumentError) as error:
        refuse(_as_flag_error(_root_cause(error), spec))
    except KeyboardInterrupt:
        sys.exit(130)


def _quoted(arguments: list[str], spec: Command) -> list[str]:
    """Texts and paths in quotation marks: draccus reads each value as YAML, where `a #1` is `a`."""
    texts = {f"--{flag.name}" for group in spec.groups() for flag in group.flags if _is_text(flag.kind)}
    quoted: list[str] = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if name == "--config_path":
            word = f"{name}{equals}{_with_home(value)}"
        elif name in texts and equals:
            word = f"{name}={_as_text(value)}"
        elif quoted and quoted[-1] in texts and not word.startswith("--"):
            word = _as_text(word)
        quoted.append(word)
    return quoted


def _is_text(kind: Any) -> bool:
    kinds = get_args(kind) if is_union(kind) else (kind,)
    return set(kinds) - {NoneType} <= {str, Path}


def _as_text(value: str) -> str:
    is_literal = value in ("", "null", "None") or value[0] in "\"'"
    return value if is_literal else json.dumps(value, ensure_ascii=False)


def _unreadable(arguments: list[str], error: yaml.YAMLError, spec: Command) -> FlagError:
    for word in arguments:
        try:
            yaml.safe_load(word.partition("=")[2])
        except yaml.YAMLError:
            return FlagError(
                f"{word} cannot be read: is a bracket or a quotation mark missing? ({spec.name} --help)"
            )
    return FlagError(f"{first_line(error)} ({spec.name} --help)")


def _at_home(config: Any) -> Any:
    """`~` in its paths as the user's home: a shell leaves the one after `=` alone."""
    for each in fields(config):
        value = getattr(config, each.name)
        if isinstance(value, Path):
            setattr(config, each.name, Path(_with_home(str(value))))
        elif is_dataclass(value):
            _at_home(value)
    if isinstance(config, DatasetSource) and config.root is not None:
        config.root = _with_home(config.root)
    return config


def _with_home(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # no such user: then it is a name
        return path


def _refuse_missing_config(arguments: Sequence[str]) -> None:
    for word in arguments:
        path = Path(word.removeprefix("--config_path="))
        if word.startswith("--config_path=") and not path.is_file():
            beside = [str(each) for each in path.parent.glob("*.y*ml")]
            raise FlagError(f"{word}: there is no such file{did_you_mean(str(path), beside)}")


def refuse(error: BaseException) -> NoReturn:
    """Exit with the error's message."""
    text = f"error: {error}"
    if not isinstance(error, FlagError):
        sys.exit(text)
    print(text, file=sys.stderr)
    sys.exit(2)


def usable_device(device: str | None) -> str:
    """The device to compute on, found out before the dataset and the LAM are read."""
    if device is None:
        if not any(each.is_available() for each in (torch.cuda, torch.backends.mps, torch.xpu)):
            return "cpu"  # LeRobot would log a warning about it
        return auto_select_torch_device().type
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device={device} cannot be used here ({first_line(error)}); expected cuda, mps or cpu, or "
            "leave it out for the best there is"
        ) from error
    return device


def counted(number: int, noun: str) -> str:
    """`1 frame`, `2 frames`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean …?`, or a full stop if no known word is similar."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else "."


def _without_traceback(record: logging.LogRecord) -> bool:
    """Drop the page on torchcodec that LeRobot logs without FFmpeg; its next line says that it uses PyAV."""
    return "libtorchcodec" not in record.getMessage()


def _as_flag_error(error: BaseException, spec: Command) -> BaseException:
    """Reword errors of argparse and draccus about flags; return other errors unchanged."""
    flags = {flag.name: flag for group in spec.groups() for flag in group.flags}
    if isinstance(error, argparse.ArgumentError):
        return FlagError(f"{error.argument_name} needs a value ({spec.name} --help)")
    if not isinstance(error, DraccusException):
        return error
    path = [*getattr(error, "key_path", [])]
    text = getattr(error, "message", str(error))
    named = [".".join([*path, name]) for name in re.findall("`(.+?)`", text)]
    if text.startswith("unrecognized arguments: "):
        words = text.removeprefix("unrecognized arguments: ").split()
        return _unknown([word.partition("=")[0] for word in words if word.startswith("-")] or words, spec)
    if text.startswith("The fields "):
        return _unknown([f"--{name}" for name in named], spec)
    if text.startswith("Missing required field(s) "):
        return FlagError("\n  ".join(_missing_problems(named, spec)) + f" ({spec.name} --help)")
    unread = re.match(r"Couldn't parse '(.*)' into (?:an? )?(.*)", text, re.S)
    if path and unread:
        flag = flags.get(".".join(path))
        kind = flag.metavar if flag is not None else unread[2]
        return FlagError(
            f"--{'.'.join(path)}={unread[1]} cannot be read, expected {kind} ({spec.name} --help)"
        )
    where = f"--{'.'.join(path)}: " if path else ""
    return FlagError(f"{where}{text} ({spec.name} --help)")


def _missing_problems(names: list[str], spec: Command) -> list[str]:
    """One problem for each of these missing flags and for each required flag nested below them."""
    below = tuple(f"{name}." for name in names)
    flags = [flag for group in spec.groups() for flag in group.flags]
    missing = [
        flag for flag in flags if flag.name in names or (flag.required and f"{flag.name}.".startswith(below))
    ]
    return [f"{' or '.join(spec.spelled(flag))} is missing: {flag.text}" for flag in missing]


def _unknown(words: list[str], spec: Command) -> FlagError:
    return FlagError("\n  ".join(_unknown_problems(words, spec)) + f" All flags: {spec.name} --help")


def _unknown_problems(words: list[str], spec: Command) -> list[str]:
    known = [f"--{flag.name}" for group in spec.groups() for flag in group.flags]
    known += ["--config_path", *(dashed for dashed, name in DASHED.items() if f"--{name}" in known)]
    return [f"unknown flag {word}{did_you_mean(word, known)}" for word in words]


def _root_cause(error: BaseException) -> BaseException:
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
        raise FlagError(f"{flag} needs a value")
    return rest.pop(0)
