"""Errors that are the user's to mend: all at once, with what was found, what was expected, what to do."""


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
