"""Where a reader expects a file there is something else: a pipe, a device, a circle of links, no end."""

import faulthandler
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lerobot_lam_diffusion.lam import fingerprint_of, load_lam
from lerobot_lam_diffusion.lam.config import CONFIG_FILE
from lerobot_lam_diffusion.lam.loading import open_weights
from lerobot_lam_diffusion.lam.locating import WEIGHTS_FILE
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.tokens.provenance import VQ
from lerobot_lam_diffusion.utils.errors import LamError, UserError, shown
from lerobot_lam_diffusion.utils.files import UnreadableError, check_regular, parse_json
from tests.fuzz.conftest import check_refusal
from tests.fuzz.test_fuzz_lam import Reader as LamReader
from tests.fuzz.test_fuzz_pt import META, NUMBERS, saved
from tests.fuzz.test_fuzz_store import write

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


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    write(folder / "store", VQ, "uint8")
    (folder / "pt").mkdir()
    (folder / "pt" / "tokens.pt").write_bytes(saved({"tokens": NUMBERS}))
    return {"LAM": LamReader(folder).good, "store": folder / "store", "pt": folder / "pt"}


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


def test_special_files_are_refused(good, tmp_path, fuzz):
    def inputs() -> Iterator[tuple[str, tuple[str, Path, type[UserError]]]]:
        for reader, name, error in FILES:
            for kind, make in SPECIAL.items():
                folder = tmp_path / f"{reader} {name} {kind}"
                shutil.copytree(good["LAM" if reader == "fingerprint" else reader], folder)
                (folder / name).unlink()
                make(folder / name)
                yield f"{reader}, {name}: {kind}", (reader, folder, error)

    def check(given: tuple[str, Path, type[UserError]]) -> str:
        reader, folder, expected = given
        with pytest.raises(expected) as error:
            OPEN[reader](folder)
        return check_refusal(error.value, expected)

    counts = fuzz("special files", inputs(), check)
    assert counts == {"refused": len(FILES) * len(SPECIAL)}


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
    with open_weights(folder) as weights:
        os.truncate(folder / WEIGHTS_FILE, 6000)
        with pytest.raises(LamError, match="is not a readable safetensors file"):
            list(map(weights.tensor, weights.keys))


def test_a_store_in_use_survives_that_another_takes_its_place(good, tmp_path):
    shutil.copytree(good["store"], tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    before = store.values.clone()
    (tmp_path / "new").write_bytes(b"other")
    os.replace(tmp_path / "new", tmp_path / "store" / TENSORS_FILE)
    assert torch.equal(store.values, before)


def test_a_store_that_is_shortened_in_place_kills_its_readers(good, tmp_path):
    """What no check can prevent; documented at `map_store`. If this fails, that text can go."""
    shutil.copytree(good["store"], tmp_path / "store")
    child = os.fork()
    if not child:
        faulthandler.disable()  # it would print that this process dies
        store = TokenStore.open(tmp_path / "store")
        os.truncate(store.path / TENSORS_FILE, 0)
        store.values.sum()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS


def test_messages_are_short_whatever_is_shown():
    circle: list = []
    circle.append(circle)
    doubled: list = [1]
    for _ in range(60):
        doubled = [doubled, doubled]
    for value in ("x" * 10**6, 10**5000, circle, doubled, {"a": doubled}, ["x" * 100] * 100):
        assert len(shown(value)) <= 80
    assert shown({"torch": 2}) == "{'torch': 2}"


def test_reasons_of_refused_documents():
    for content, reason in {
        b'{"a": 1, "a": 2}': "the key 'a' occurs twice",
        b"[" * 100_000: "nested too deeply",
        b'"\\ud800"': "surrogates not allowed",
        b"\xff": "invalid start byte",
    }.items():
        with pytest.raises(UnreadableError, match=reason):
            parse_json(content)
    with pytest.raises(UnreadableError, match="expected a file"):
        check_regular(Path("/dev/zero"))
