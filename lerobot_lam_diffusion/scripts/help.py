"""What the commands tell of their flags, in `--help` and in docs/REFERENCE.md: read off their dataclasses.

The text of a flag is its entry in the docstring of its dataclass. The sections of that docstring (`Args:`,
`Speed and memory:`) are the groups of the help.
"""

import argparse
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import partial
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

WIDTH = 100
METAVARS = {bool: "true|false", int: "N", float: "X", list[int]: "[N,N]", list[str]: "[TEXT,TEXT]"}
CONFIG_PATH = "A YAML file that holds flags; those of the command line win."


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


@dataclass(frozen=True)
class Group:
    """Flags under one heading; `about` says what all of them are for."""

    title: str
    about: str
    flags: list[Flag]


@dataclass(frozen=True)
class Command:
    """A command line: what it is called, its dataclass, and what it is about (with examples)."""

    name: str
    config_class: type
    about: str
    paths: str = ""
    hidden: tuple[str, ...] = ()
    """Flags that its dataclass has but the command rejects."""

    def groups(self) -> list[Group]:
        return [
            Group(group.title, group.about, [flag for flag in group.flags if flag.name not in self.hidden])
            for group in groups_of(self.config_class)
        ]

    def spelled(self, flag: Flag) -> list[str]:
        """The positional word that can replace the flag, if there is one, and the flag itself."""
        word = flag.name.upper()
        return [*([word] if word in self.paths.split() else []), f"--{flag.name}"]

    def usage(self) -> str:
        needed = [
            f"--{flag.name}={flag.metavar}"
            for group in self.groups()
            for flag in group.flags
            if flag.required
        ]
        given = {f"--{word.lower()}=TEXT" for word in self.paths.split()}
        words = [self.name, *self.paths.split(), *(flag for flag in needed if flag not in given), "[flags]"]
        return " ".join(words)

    def help(self) -> str:
        """The text of `--help`."""
        parser = _parser(self.usage().replace("%", "%%"), self.about.strip())
        for group in self.groups():
            section = parser.add_argument_group(group.title, group.about or None)
            for flag in group.flags:
                spelled = self.spelled(flag)
                required = f" (required: {' or '.join(spelled)})" if len(spelled) > 1 else " (required)"
                _add(section, flag, required if flag.required else "")
        rest = parser.add_argument_group("always")
        rest.add_argument("--config_path", metavar="FILE", help=CONFIG_PATH)
        rest.add_argument("--help", "-h", action="store_true", help="This text.")
        return parser.format_help()


def fields_help(config_class: type, prefix: str) -> str:
    """The documented fields of a dataclass as `--help` shows flags, each as `--{prefix}{name}`."""
    parser = _parser(argparse.SUPPRESS)
    for group in groups_of(config_class):
        section = parser.add_argument_group(group.title)
        for flag in group.flags:
            _add(section, replace(flag, name=f"{prefix}{flag.name}"))
    return parser.format_help()


def _parser(usage: str, description: str | None = None) -> argparse.ArgumentParser:
    shape = partial(argparse.RawDescriptionHelpFormatter, width=WIDTH, max_help_position=32)
    return argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=shape, add_help=False
    )


def _add(section: argparse._ArgumentGroup, flag: Flag, required: str = "") -> None:
    end = f" (default: {flag.default})" if flag.default else required
    section.add_argument(f"--{flag.name}", metavar=flag.metavar, help=f"{flag.text}{end}".replace("%", "%%"))


def groups_of(config_class: type) -> Iterator[Group]:
    """The flags of a dataclass, by group; a field that is itself a dataclass forms its own group."""
    sections, texts = documented(config_class), {}
    for entries in sections.values():
        texts.update(entries)
    for each in fields(config_class):
        inner = _dataclass_in(_kinds(config_class)[each.name])
        if inner is not None:
            yield Group(each.name, texts.get(each.name, ""), _inner_flags(each, inner))
    for title, entries in sections.items():
        flags = [
            _flag(config_class, each, texts) for each in _plain_fields(config_class) if each.name in entries
        ]
        if flags:
            yield Group("flags" if title == "Args" else title.lower(), "", flags)


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


def _plain_fields(config_class: type) -> list[Field]:
    kinds = _kinds(config_class)
    return [each for each in fields(config_class) if _dataclass_in(kinds[each.name]) is None]


def _inner_flags(outer: Field, inner: type) -> list[Flag]:
    texts = {name: text for entries in documented(inner).values() for name, text in entries.items()}
    optional = outer.default is not MISSING or outer.default_factory is not MISSING
    given = outer.default_factory() if outer.default_factory is not MISSING else None
    flags = []
    for each in fields(inner):
        if each.name not in texts:
            continue
        flag = _flag(inner, each, texts)
        default = flag.default if given is None else _shown_default(getattr(given, each.name))
        required = flag.required and not optional
        flags.append(Flag(f"{outer.name}.{each.name}", flag.kind, required, default, flag.text))
    return flags


def _flag(config_class: type, each: Field, texts: dict[str, str]) -> Flag:
    required = each.default is MISSING and each.default_factory is MISSING
    default = None if each.default is MISSING else _shown_default(each.default)
    return Flag(each.name, _kinds(config_class)[each.name], required, default, texts.get(each.name, ""))


def _shown_default(default: Any) -> str | None:
    """A default as the command line writes it."""
    if default is None:
        return None
    return str(default).lower() if isinstance(default, bool) else str(default)


def _kinds(config_class: type) -> dict[str, Any]:
    return get_type_hints(config_class)


def _dataclass_in(kind: Any) -> type | None:
    """The dataclass that a field holds, perhaps optionally."""
    return next(
        (each for each in (kind, *get_args(kind)) if isinstance(each, type) and is_dataclass(each)), None
    )
