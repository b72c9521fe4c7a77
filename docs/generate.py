"""What is generated of the docs (`make docs`): REFERENCE.md, and the text files that `--help` shows.

All of it is read off the commands' dataclasses: the text of a flag is its entry in the docstring, whose
sections (`Args:`, `Speed and memory:`) are the groups of the help. tests/docs/test_generated.py fails
where the files are not what this writes.
"""

import argparse
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lerobot_lam_diffusion import DiffusionLamConfig
from lerobot_lam_diffusion.scripts import convert_lam, demo, fit_lam, precompute_lam_tokens, tokens
from lerobot_lam_diffusion.scripts.command_line import Command

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "docs/REFERENCE.md"
HELP_TEXTS = "lerobot_lam_diffusion/scripts/help_texts"
WIDTH = 100
METAVARS = {bool: "true|false", int: "N", float: "X", list[int]: "[N,N]", list[str]: "[TEXT,TEXT]"}

COMMANDS = [
    precompute_lam_tokens.COMMAND,
    fit_lam.COMMAND,
    convert_lam.COMMAND,
    *(tokens.subcommand(name)[0] for name in tokens.COMMANDS),
    demo.COMMAND,
]

HEAD = """# Reference

Generated from the code by `make docs`: the fields of the policy and the flags of the commands. What they are
for is explained in [PRECOMPUTED_LAM_TOKENS.md](PRECOMPUTED_LAM_TOKENS.md), what can go wrong in
[TROUBLESHOOTING.md](TROUBLESHOOTING.md).

A flag without a default that is not required is found out, or decided, as its text says.
[configs/](../configs) has YAML files for `--config_path`, to start from.
"""

POLICY = """## Policy fields

Of `--policy.type=diffusion_lam`, as `--policy.NAME=VALUE` on the command lines of LeRobot and as arguments of
`DiffusionLamConfig`. Those of LeRobot's `DiffusionConfig` keep their meaning and are not repeated here.
"""


def generated() -> dict[str, str]:
    """Path in the repository → content."""
    texts = {command.name: help_of(command) for command in COMMANDS}
    texts["lerobot-lam-tokens"] = subcommands_help("[STORE …] ", tokens.__doc__)
    texts["lerobot-lam-tokens cache"] = subcommands_help("", None, "cache ")
    files = {f"{HELP_TEXTS}/{name.replace(' ', '-')}.txt": text for name, text in texts.items()}
    return {REFERENCE: reference(), **files}


def reference() -> str:
    parts = [HEAD, POLICY, fenced(fields_help(DiffusionLamConfig, "policy.")), "## Commands\n"]
    for command in COMMANDS:
        parts += [f"### {command.name}\n", fenced(help_of(command))]
    return "\n".join(parts)


def fenced(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"


# --- help texts


@dataclass(frozen=True)
class Flag:
    """One flag: `name` has no dashes; `default` is None if there is none to show."""

    name: str
    kind: Any
    required: bool
    default: str | None
    text: str

    @property
    def metavar(self) -> str:
        kinds = [kind for kind in get_args(self.kind) if kind is not NoneType]
        kind = kinds[-1] if get_origin(self.kind) in (Union, UnionType) else self.kind
        return METAVARS.get(kind, getattr(kind, "__name__", "value").upper().replace("STR", "TEXT"))


def help_of(command: Command) -> str:
    """The text of a command's `--help`."""
    word = command.words.upper()
    groups = [
        (title, about, [flag for flag in flags if flag.name not in command.hidden])
        for title, about, flags in groups_of(command.config_class)
    ]
    needed = [
        f"--{flag.name}={flag.metavar}"
        for _, _, flags in groups
        for flag in flags
        if flag.required and flag.name != command.words
    ]
    shown = {"": [], "STORES": ["STORE …"]}.get(word, [word])
    about = command.about.strip()
    if command.name.startswith("lerobot-lam-tokens"):
        about = f"{summary_of(command.config_class)}\n\n{command.about}".strip()
    usage = " ".join([command.name, *shown, *needed, "[flags]"])
    parser = parser_of(usage.replace("%", "%%"), about)
    for title, text, flags in groups:
        section = parser.add_argument_group(title, text or None)
        for flag in flags:
            either = f": {word} or --{flag.name}" if flag.name == command.words else ""
            add(section, flag, f" (required{either})" if flag.required else "")
    rest = parser.add_argument_group("always")
    config_path = "A YAML file that holds flags; those of the command line win."
    rest.add_argument("--config_path", metavar="FILE", help=config_path)
    rest.add_argument("--help", "-h", action="store_true", help="This text.")
    return parser.format_help()


def subcommands_help(words: str, about: str | None, prefix: str = "") -> str:
    """The text of `lerobot-lam-tokens --help`; with a prefix, of the subcommands that start with it."""
    names = [
        f"    {name:<14}{summary_of(tokens.subcommand(name)[0].config_class)}"
        for name in tokens.COMMANDS
        if name.startswith(prefix)
    ]
    usage = f"usage: lerobot-lam-tokens {prefix}COMMAND {words}[flags]\n"
    parts = [usage, *([about] if about else []), *names, "\nEach takes --help, which tells its flags."]
    return "\n".join(parts) + "\n"


def fields_help(config_class: type, prefix: str) -> str:
    """The documented fields of a dataclass as `--help` shows flags, each as `--{prefix}{name}`."""
    parser = parser_of(argparse.SUPPRESS)
    for title, _, flags in groups_of(config_class):
        section = parser.add_argument_group(title)
        for flag in flags:
            add(section, replace(flag, name=f"{prefix}{flag.name}"))
    return parser.format_help()


def parser_of(usage: str, description: str | None = None) -> argparse.ArgumentParser:
    shape = partial(argparse.RawDescriptionHelpFormatter, width=WIDTH, max_help_position=32)
    return argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=shape, add_help=False
    )


def add(section: argparse._ArgumentGroup, flag: Flag, required: str = "") -> None:
    end = f" (default: {flag.default})" if flag.default else required
    section.add_argument(f"--{flag.name}", metavar=flag.metavar, help=f"{flag.text}{end}".replace("%", "%%"))


def groups_of(config_class: type) -> Iterator[tuple[str, str, list[Flag]]]:
    """Title, text and flags of each group; a field that is itself a dataclass forms a group."""
    flags, sections = flags_of(config_class), documented(config_class)
    for each in fields(config_class):
        if (inner := dataclass_in(flags[each.name].kind)) is None:
            continue
        given = None if each.default_factory is MISSING else each.default_factory()
        yield each.name, flags[each.name].text, [
            Flag(
                f"{each.name}.{name}",
                flag.kind,
                flag.required and flags[each.name].required,
                flag.default if given is None else shown_default(getattr(given, name)),
                flag.text,
            )
            for name, flag in flags_of(inner).items()
            if flag.text
        ]  # fmt: skip
    for title, entries in sections.items():
        own = [flag for flag in flags.values() if flag.name in entries and not dataclass_in(flag.kind)]
        if own:
            yield "flags" if title == "Args" else title.lower(), "", own


def flags_of(config_class: type) -> dict[str, Flag]:
    """A flag for each field, by its name."""
    texts = {name: text for entries in documented(config_class).values() for name, text in entries.items()}
    kinds = get_type_hints(config_class)
    return {
        each.name: Flag(
            name=each.name,
            kind=kinds[each.name],
            required=each.default is MISSING and each.default_factory is MISSING,
            default=None if each.default is MISSING else shown_default(each.default),
            text=texts.get(each.name, ""),
        )
        for each in fields(config_class)
    }


def documented(config_class: type) -> dict[str, dict[str, str]]:
    """The sections of its docstring: title → name → text."""
    sections = {}
    for title, body in re.findall(
        r"^(\w[\w ,]*):\n((?:(?:    .*)?\n?)+)", inspect.getdoc(config_class) or "", re.M
    ):
        entries = re.findall(r"^    (\w+): (.+(?:\n        .+)*)", body, re.M)
        sections[title] = {name: re.sub(r"\s+", " ", text) for name, text in entries}
    sections.pop("Raises", None)
    return sections


def summary_of(config_class: type) -> str:
    """The first paragraph of its docstring."""
    return re.sub(r"\s+", " ", (inspect.getdoc(config_class) or "").split("\n\n")[0])


def shown_default(default: Any) -> str | None:
    """A default as the command line writes it."""
    if default is None:
        return None
    return str(default).lower() if isinstance(default, bool) else str(default)


def dataclass_in(kind: Any) -> type | None:
    """The dataclass that a field holds, perhaps optionally."""
    kinds = (kind, *get_args(kind))
    return next((each for each in kinds if isinstance(each, type) and is_dataclass(each)), None)


def main() -> None:
    texts = generated()
    for stale in (ROOT / HELP_TEXTS).glob("*.txt"):
        if f"{HELP_TEXTS}/{stale.name}" not in texts:
            stale.unlink()
    for path, text in texts.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
