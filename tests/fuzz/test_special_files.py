"""Where a reader expects a file there is something else: a pipe, a device, a circle of links, no end."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lerobot_lam_diffusion.lam import fingerprint_of, load_lam
from lerobot_lam_diffusion.lam.config import CONFIG_FILE
from lerobot_lam_diffusion.lam.loading import open_weights
from lerobot_lam_diffusion.lam.locating import WEIGHTS_FILE
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.utils.errors import LamError, shown
from lerobot_lam_diffusion.utils.files import UnreadableError, read_json
from tests.fuzz.conftest import META, check_refusal

BEYOND_MEMORY = 1 << 40


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(BEYOND_MEMORY)


def _sparse_header(path: Path) -> None:
    """A file of a terabyte, nearly all of which its header claims to be header."""
    with path.open("wb") as file:
        file.write((BEYOND_MEMORY - 8).to_bytes(8, "little"))
        file.truncate(BEYOND_MEMORY)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "random device": lambda path: path.symlink_to("/dev/urandom"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to its folder": lambda path: path.symlink_to("."),
    "own memory": lambda path: path.symlink_to("/proc/self/mem"),
    "terabyte of zeros": _sparse,
    "terabyte of header": _sparse_header,
    "empty file": Path.touch,
}


def _open_pt(folder: Path) -> object:
    return TokenStore.open(folder / "tokens.pt", META)


OPEN: dict[str, Callable[[Path], object]] = {
    "LAM": load_lam,
    "fingerprint": fingerprint_of,
    "store": TokenStore.open,
    "pt": _open_pt,
}
FILES = [
    ("LAM", CONFIG_FILE, LamError),
    ("LAM", WEIGHTS_FILE, LamError),
    ("fingerprint", CONFIG_FILE, LamError),
    ("fingerprint", WEIGHTS_FILE, LamError),
    ("store", PROVENANCE_FILE, TokenStoreError),
    ("store", TENSORS_FILE, TokenStoreError),
    ("pt", "tokens.pt", TokenStoreError),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("reader", "name", "expected"), FILES)
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused(good, tmp_path, reader, name, expected, kind):
    folder = tmp_path / "copy"
    shutil.copytree(good["LAM" if reader == "fingerprint" else reader], folder)
    (folder / name).unlink()
    SPECIAL[kind](folder / name)
    with pytest.raises(expected) as error:
        OPEN[reader](folder)
    check_refusal(error.value, expected)


@pytest.mark.parametrize(
    "path",
    ["x" * 5000, "x/" * 3000, "a\0b", "~nobody-of-that-name/x", "", ".", "/dev/zero", "/dev/null/x", "ä/ö",
     "a/b--c", "a/b..c", "a/" + "b" * 200, "../" * 50 + "nowhere", "\ud800"],
)  # fmt: skip
@pytest.mark.parametrize("reader", ["LAM", "store", "tokens.pt"])
def test_paths_that_cannot_be(reader, path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if reader == "LAM":
        with pytest.raises(LamError):
            load_lam(path)
    else:
        with pytest.raises(TokenStoreError):
            TokenStore.open(f"{path}.pt" if reader == "tokens.pt" else path, META)


@pytest.mark.parametrize("revision", ["../../x", "a\0b", "", "x/../y", "/etc/passwd", "--x", "x" * 5000])
def test_revisions_that_cannot_be(revision):
    with pytest.raises(LamError):
        load_lam("someone/a-lam", revision=revision)


@pytest.mark.parametrize("reader", OPEN)
def test_links_to_good_files_are_followed(good, reader, tmp_path):
    """The Hub's cache consists of links."""
    whole = good["LAM" if reader == "fingerprint" else reader]
    for file in whole.iterdir():
        (tmp_path / file.name).symlink_to(os.path.relpath(file, tmp_path))
    assert OPEN[reader](tmp_path)


def test_weights_that_get_shorter_while_they_are_read(good, tmp_path):
    """Read, not mapped: an error where a map would kill the process."""
    folder = tmp_path / "lam"
    shutil.copytree(good["LAM"], folder)

    def read() -> None:
        with open_weights(folder) as weights:
            os.truncate(folder / WEIGHTS_FILE, 6000)
            list(map(weights.get_tensor, weights.keys()))

    with pytest.raises(LamError, match="is not a readable safetensors file"):
        read()


def test_messages_are_short_whatever_is_shown():
    circle: list = []
    circle.append(circle)
    doubled: list = [1]
    for _ in range(60):
        doubled = [doubled, doubled]
    for value in ("x" * 10**6, 10**5000, circle, doubled, {"a": doubled}, ["x" * 100] * 100):
        assert len(shown(value)) <= 80
    assert shown({"torch": 2}) == "{'torch': 2}"


def test_reasons_of_refused_documents(tmp_path):
    path = tmp_path / "x.json"
    for content, reason in {
        b"[" * 100_000: "recursion",
        b"\xff": "invalid start byte",
        b"{": "xpect",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UnreadableError, match=reason):
            read_json(path)
    path.write_bytes(b" " * 11)
    with pytest.raises(UnreadableError, match="larger than 10 bytes"):
        read_json(path, at_most=10)
    with pytest.raises(UnreadableError, match="expected a file"):
        read_json(Path("/dev/zero"))
