"""What our command lines share: LeRobot's flags, the dash-spelled ones, and errors without a traceback.

draccus itself takes `--dataset.repo_id=x`; it knows neither `--dataset-repo-id x` nor `--episodes 0 1 2`.
"""

import argparse
import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

import draccus
import torch
import yaml
from draccus.utils import DecodingError, DraccusException
from lerobot.utils.device_utils import auto_select_torch_device

from lerobot_lam_diffusion.utils.errors import FlagError, UserError, first_line, one_line

if TYPE_CHECKING:
    from lerobot_lam_diffusion.lam import LatentActionModel

DASHED = {
    "--dataset-repo-id": "--dataset.repo_id",
    "--dataset-root": "--dataset.root",
    "--episodes": "--dataset.episodes",
    "--lam-model-path": "--lam.path",
    "--lam-revision": "--lam.revision",
    "--image-size": "--dims.image_size",
    "--code-seq-len": "--dims.code_seq_len",
    "--num-heads": "--dims.num_heads",
    "--dino-num-heads": "--dims.dino_num_heads",
}
"""Those in which a dash stands for more than an underscore."""
SWITCHES = {
    "--no-vq-tokens": "--use_vq_tokens=false",
    "--vq-tokens": "--use_vq_tokens=true",
    "--record-only": "--record_only=true",
}
LISTS = {"--dataset.episodes"}
VIDEO_BACKENDS = ("torchcodec", "pyav", "video_reader")


@dataclass(frozen=True)
class Command:
    """A command line; `make docs` writes its `--help` (see docs/generate.py).

    Attributes:
        name: What it is called.
        config_class: Dataclass of its flags.
        about: What it does, with examples.
        words: The flag that words before the first flag stand for; empty: there are none.
        hidden: Flags that its dataclass has but the command rejects.
    """

    name: str
    config_class: type
    about: str
    words: str = ""
    hidden: tuple[str, ...] = ()

    @property
    def takes_several(self) -> bool:
        """Whether `words` is a list."""
        return get_type_hints(self.config_class).get(self.words) == list[str]

    def arguments(self, argv: Sequence[str]) -> list[str]:
        """A command line as draccus takes it, but for the quotation of its values."""
        return normalise(self._with_flag(argv) if self.words else argv)

    def _with_flag(self, argv: Sequence[str]) -> list[str]:
        count = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
        given, flags = list(argv[:count]), list(argv[count:])
        if not given:
            return flags
        if len(given) > 1 and not self.takes_several:
            raise FlagError(f"expected one {self.words.upper()}, found {', '.join(given)}")
        value = given if self.takes_several else given[0]
        return [f"--{self.words}={json.dumps(value, ensure_ascii=False)}", *flags]


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


def run_command(command: Command, function: Callable[[Any], None], argv: Sequence[str] | None = None) -> None:
    """Parse a command line into the command's dataclass and run `function` on it.

    Bad input exits with a single message: status 2 if a flag is unknown, missing or cannot be parsed,
    otherwise 1. An interrupt exits with status 130.
    """
    logging.getLogger("lerobot.utils.import_utils").addFilter(_without_traceback)
    try:
        arguments = [_quoted(each) for each in command.arguments(sys.argv[1:] if argv is None else argv)]
        function(_at_home(draccus.parse(command.config_class, args=arguments, exit_on_error=False)))
    except (UserError, OSError, DraccusException, argparse.ArgumentError) as error:
        refuse(_as_flag_error(_root_cause(error), command))
    except KeyboardInterrupt:
        sys.exit(130)


def _quoted(argument: str) -> str:
    """Its value in quotation marks: draccus reads values as YAML, where `a #1` is `a`, and decodes texts.

    Lists, mappings, truth values and null stay what they are in YAML.

    Raises:
        FlagError: one of these is not YAML.
    """
    name, equals, value = argument.partition("=")
    if value and value[0] not in "[{\"'" and value.lower() not in ("true", "false", "null"):
        value = json.dumps(value, ensure_ascii=False)
    try:
        yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise FlagError(f"{argument} cannot be read: is a bracket or a quotation mark missing?") from error
    return f"{name}{equals}{value}"


def _at_home(config: Any) -> Any:
    """`~` in its paths as the user's home: a shell leaves the one after `=` alone."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            _at_home(value)
        elif isinstance(value, str | Path) and str(value).startswith("~"):
            setattr(config, each.name, type(value)(os.path.expanduser(value)))
    return config


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
            f"the device {device} cannot be used here ({first_line(error)}); expected cuda, mps or cpu, or "
            "no --device for the best there is"
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


def _as_flag_error(error: BaseException, command: Command) -> BaseException:
    """Errors of argparse and draccus about flags in one line that names them; other errors unchanged."""
    if not isinstance(error, DraccusException | argparse.ArgumentError):
        return error
    path, text = [], str(error)
    if isinstance(error, DecodingError):
        path, text = [*error.key_path], error.message
    text = one_line(text)
    text = re.sub("`(.+?)`", lambda name: f"--{'.'.join([*path, name[1]])}", text)
    if path and "--" not in text:
        text = f"--{'.'.join(path)}: {text}"
    if text.startswith("unrecognized arguments: "):
        known = list(draccus.argparsing.ArgumentParser(command.config_class).parser._option_string_actions)
        text = text.replace('"', "")  # of the values, see `_quoted`
        text += did_you_mean(text.split()[2].partition("=")[0], known)
    return FlagError(f"{text} ({command.name} --help)")


def _root_cause(error: BaseException) -> BaseException:
    """The error that says what is wrong: draccus wraps what a config's own checks raise."""
    while type(error) is draccus.ParsingError and error.__cause__ is not None:
        error = error.__cause__
    return error


def normalise(argv: Sequence[str]) -> list[str]:
    """Arguments as `--a_b=value`: `--a-b value` with a dash for each underscore, or as in `DASHED`."""
    arguments: list[str] = []
    rest = list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            arguments.append(f"{name}{equals}{value}")
            continue
        flag = DASHED.get(name, f"--{name[2:].replace('-', '_')}")
        values = [value] if equals else []
        while rest and not rest[0].startswith("--") and (flag in LISTS or not values):
            values.append(rest.pop(0))
        if flag in LISTS:
            numbers = " ".join(values).replace(",", " ").strip("[] ").split()
            arguments.append(f"{flag}=[{','.join(numbers)}]")
        elif values:
            arguments.append(f"{flag}={values[0]}")
        else:
            arguments.append(SWITCHES.get(name.replace("_", "-"), flag))
    return arguments
