"""The one exception a user of a latent action model gets to see."""

from lerobot_lam_diffusion.problems import UserError


class LamError(UserError):
    """A LAM cannot be opened, used or fitted as asked.

    The message says what was found, what was expected and what to do; several problems come as one error.
    """

    section = "the-lam"


def problems_to_error(what: str, problems: list[str], remedy: str) -> LamError:
    """All problems of one thing as one error, one line each."""
    return LamError("\n".join([f"{what}:", *(f"  - {problem}" for problem in problems), remedy]))
