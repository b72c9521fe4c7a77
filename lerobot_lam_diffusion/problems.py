"""Errors that are the user's to mend: all at once, with what was found, what was expected, what to do."""

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input. Command lines print its message without a traceback.

    A note, which `str(error)` leaves out, names the section of the docs that has its message.
    """

    docs = "docs/TROUBLESHOOTING.md"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.add_note(f"See {self.docs}")


class LamNotFoundError(UserError):
    """Live tokens are needed, and there is no LAM to compute them."""

    docs = "docs/TROUBLESHOOTING.md#training-and-deployment"


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
        raise_problems(f"{noun} {name} does not fit the policy", [*own, *common])
    listed = [f"{name}: {problem}" for name, own in problems for problem in own]
    raise_problems(f"the {noun}s do not fit the policy", [*common, *dict.fromkeys(listed)])
