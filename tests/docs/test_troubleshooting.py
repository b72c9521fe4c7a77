"""docs/TROUBLESHOOTING.md has a row for every error of ours, and no row for errors that are gone."""

import re
from pathlib import Path

import pytest

from lerobot_lam_diffusion import problems
from lerobot_lam_diffusion.lam import LamError
from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.tokens import TokenStoreError
from tests.docs.messages import messages

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "TROUBLESHOOTING.md").read_text("utf-8")
FOREIGN = "(LeRobot's)"


def rows(foreign: bool = False) -> list[str]:
    """The messages in the first column, those of LeRobot or ours; `…` is what varies."""
    firsts = re.findall(r"^\| (`.*?) \|", PAGE, re.M)
    return [row for first in firsts if (FOREIGN in first) == foreign for row in re.findall("`(.+?)`", first)]


def matches(row: str, message: str) -> bool:
    """Whether the fixed parts of a row occur in a message, in that order."""
    return re.search(".*".join(map(re.escape, row.split("…"))), message, re.S) is not None


def test_rows_are_found_in_messages():
    assert matches("no token store at …", "no token store at …: it is a file")
    assert matches("… lacks episode …, which frame", "… lacks episode …, which frame … belongs to")
    assert not matches("lacks frame … of", "… of … lacks frame …")
    assert len(rows()) > 100
    assert rows(foreign=True) == ["invalid choice: 'diffusion_lam'", "unrecognized arguments: …"]


def test_every_error_has_a_row():
    missing = {
        text: place for text, place in messages().items() if not any(matches(row, text) for row in rows())
    }
    told = "\n".join(f"{place}: {text}" for text, place in missing.items())
    assert not missing, f"docs/TROUBLESHOOTING.md has no row for these messages, add one for each:\n{told}"


def test_no_row_is_stale_or_says_nothing():
    texts = list(messages())
    stale = [row for row in rows() if not any(matches(row, text) for text in texts)]
    assert not stale, f"docs/TROUBLESHOOTING.md has rows of errors that are gone: {stale}"
    assert not [
        row for row in rows() if len(row.replace("…", "").strip(" ().,:;=")) < 6 and "must be" not in row
    ]


@pytest.mark.parametrize("error", [UserError, LamError, TokenStoreError, problems.LamNotFoundError])
def test_an_error_names_its_section(error):
    (note,) = error("found this, do that").__notes__
    section = re.search(r"docs/TROUBLESHOOTING\.md(?:#([\w-]+))?", note)
    headings = {
        re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in re.findall("^## (.+)", PAGE, re.M)
    }
    assert section is not None
    assert section[1] is None or section[1] in headings
    assert str(error("found this, do that")) == "found this, do that"
