"""Errors that the user can fix: found, expected, what to do. Several problems are raised as one error."""

import reprlib
from collections.abc import Sequence
from typing import Any


class UserError(ValueError):
    """Bad input. Command lines print its message without a traceback."""


class FlagError(UserError):
    """A flag that does not exist, is missing, or cannot be read; command lines exit with status 2."""


class DatasetError(UserError):
    """A dataset, a camera or a video is not what was asked for."""


class LamError(UserError):
    """A latent action model cannot be opened, used or fitted as asked."""


class TokenStoreError(UserError):
    """Tokens that are missing, damaged, of another dataset, or lack a frame that is asked for."""


class ExtractionError(UserError):
    """Tokens cannot be extracted, or kept, as asked."""


class TrainingError(UserError):
    """Policy, tokens and LAM do not go together, or something is missing in a batch."""


class LamNotFoundError(TrainingError):
    """Live tokens are needed, and there is no LAM to compute them."""


class HubError(UserError):
    """A Hub transfer failed or was refused. Its message continues a sentence that names the repository."""


class DemoError(UserError):
    """The demo cannot continue."""


def raise_problems(
    what: str,
    problems: Sequence[str],
    error: type[UserError] = UserError,
    remedy: str = "",
    at_most: int = 30,
) -> None:
    """Raise one `error` that lists `problems` (the first `at_most`), or return if there are none.

    Args:
        what: What is wrong as a whole; begins the message.
        remedy: What to do about all of them; a sentence.
    """
    if not problems:
        return
    end = f" {remedy}" if remedy else ""
    if len(problems) == 1:
        raise error(f"{what}: {problems[0]}.{end}")
    lines = [f"\n  {number}. {problem}." for number, problem in enumerate(problems[:at_most], 1)]
    if len(problems) > at_most:
        lines.append(f"\n  … and {len(problems) - at_most} more.")
    raise error(f"{what}; {len(problems)} problems:{''.join(lines)}{end and chr(10)}{end.strip()}")


def raise_unfit(noun: str, problems: list[tuple[str, list[str]]], common: Sequence[str] = ()) -> None:
    """`raise_problems` for things that do not fit the policy; if several, each problem is prefixed by a name.

    Args:
        noun: What they are, in the singular.
        problems: Name of each and what is wrong with it.
        common: What is wrong with them as a whole.
    """
    if len(problems) == 1:
        ((name, own),) = problems
        raise_problems(f"{noun} {name} does not fit the policy", [*own, *common], TrainingError)
    listed = [f"{name}: {problem}" for name, own in problems for problem in own]
    raise_problems(f"the {noun}s do not fit the policy", [*common, *dict.fromkeys(listed)], TrainingError)


def first_line(error: object, at_most: int = 200) -> str:
    """The first line of an error's message, shortened: messages of decoders can quote the whole input."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= at_most else f"{line[: at_most - 1]}…"


def one_line(error: object, at_most: int = 2000) -> str:
    """An error's whole message on one line, shortened."""
    line = " ".join(str(error).split())
    return line if len(line) <= at_most else f"{line[: at_most - 1]}…"


def shown(value: Any, at_most: int = 80) -> str:
    """`repr` for a message, bounded in length and cost even if the value's own `repr` fails or never ends."""
    cut = reprlib.Repr(maxlevel=3, maxstring=at_most, maxlong=at_most, maxother=at_most)
    try:
        text = cut.repr(value)
    except (RecursionError, ValueError):  # an integer of more than 4,300 digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= at_most else f"{text[: at_most - 1]}…"
