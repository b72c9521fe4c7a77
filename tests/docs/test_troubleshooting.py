"""docs/TROUBLESHOOTING.md has a row for every error of ours, and no row for errors that are gone."""

import re
from pathlib import Path

from lerobot_lam_diffusion import problems
from lerobot_lam_diffusion.problems import TokenStoreError
from tests.docs.messages import messages, raised, sections

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "TROUBLESHOOTING.md").read_text("utf-8")
FOREIGN = "(LeRobot's)"


def rows(foreign: bool = False, text: str = PAGE) -> list[str]:
    """The messages in the first column, those of LeRobot or ours; `…` is what varies."""
    firsts = re.findall(r"^\| (`.*?) \|", text, re.M)
    return [row for first in firsts if (FOREIGN in first) == foreign for row in re.findall("`(.+?)`", first)]


def matches(row: str, message: str) -> bool:
    """Whether the fixed parts of a row occur in a message, in that order."""
    return re.search(".*".join(map(re.escape, row.split("…"))), message, re.S) is not None


def test_rows_are_found_in_messages():
    assert matches("no token store at …", "no token store at …: it is a file")
    assert matches("… lacks episode …, which frame", "… lacks episode …, which frame … belongs to")
    assert not matches("lacks frame … of", "… of … lacks frame …")
    assert len(rows()) > 100
    assert rows(foreign=True) == [
        "invalid choice: 'diffusion_lam'",
        "unrecognized arguments: …",
        "No such file or directory: '….yaml'",
        "libxcb.so.1: cannot open shared object file",
        "No working C++ compiler found",
        "Output directory … already exists and resume is False",
        "Repo id must be in the form",
        "offline mode is enabled",
    ]


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


def test_an_error_names_the_section_that_has_its_row():
    by_section = {}
    for heading, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S):
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        by_section[anchor] = rows(text=body)
    assert set(sections().values()) <= by_section.keys()
    astray = [
        f"{place}: {name} names #{sections()[name]}, which has no row for: {text}"
        for text, name, place in raised()
        if not any(matches(row, text) for row in by_section[sections()[name]])
    ]
    assert not astray, "\n".join(astray)


def test_an_error_ends_with_the_page():
    error = TokenStoreError("found this, do that")
    assert error.__notes__ == ["See docs/TROUBLESHOOTING.md#token-stores"]
    assert str(error) == "found this, do that"


def test_without_a_checkout_the_page_is_the_installed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(problems, "_PACKAGE", tmp_path / "lerobot_lam_diffusion")
    page = tmp_path / "lerobot_lam_diffusion" / "docs" / "TROUBLESHOOTING.md"
    assert problems.DatasetError("x").__notes__ == [f"See {page}#datasets-and-cameras"]
