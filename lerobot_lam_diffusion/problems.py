"""Errors that are the user's to mend: all at once, with what was found, what was expected, what to do."""

from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PAGE = "docs/TROUBLESHOOTING.md"


def docs_page() -> str:
    """The page that lists all errors: its name in a checkout, else its path in the installed package."""
    return _PAGE if (_PACKAGE.parent / _PAGE).is_file() else str(_PACKAGE / _PAGE)


class UserError(ValueError):
    """Bad input. Command lines print its message without a traceback.

    A note, which `str(error)` leaves out, names the `section` of the docs that has its message.
    """

    section = "flags-and-fields"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.add_note(self.pointer())

    @classmethod
    def pointer(cls) -> str:
        return f"See {docs_page()}#{cls.section}"


class FlagError(UserError):
    """A flag that does not exist, is missing, or cannot be read; command lines exit with status 2."""


class DatasetError(UserError):
    """A dataset, or one of its cameras, is not what was asked for."""

    section = "datasets-and-cameras"


class TokenStoreError(UserError):
    """A store that is missing, damaged, of another dataset, or lacks a frame that is asked for."""

    section = "token-stores"


class ColumnError(UserError):
    """A dataset's column of tokens is not there, or is not what it says."""

    section = "a-column-of-tokens"


class TrainingError(UserError):
    """Policy, tokens and LAM do not go together, or something is missing in a batch."""

    section = "training-and-deployment"


class ExtractionError(UserError):
    """Tokens cannot be extracted, or kept, as asked."""

    section = "extraction"


class PushError(UserError):
    """The Hub did not take a store."""

    section = "the-hub"


class DemoError(UserError):
    """The demo cannot go on."""

    section = "the-demo"


class LamNotFoundError(TrainingError):
    """Live tokens are needed, and there is no LAM to compute them."""


def raise_problems(what: str, problems: list[str], error: type[UserError] = UserError) -> None:
    """Raise one `error` that lists all `problems`, or return if there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise error(f"{what}: {problems[0]}.")
    listing = "".join(f"\n  {number}. {problem}." for number, problem in enumerate(problems, 1))
    raise error(f"{what}; {len(problems)} problems:{listing}")


def raise_unfit(noun: str, problems: list[tuple[str, list[str]]], common: Sequence[str] = ()) -> None:
    """`raise_problems` of things that do not fit the policy; of several, each problem says whose it is.

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
