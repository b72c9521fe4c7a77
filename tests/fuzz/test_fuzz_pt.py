"""A `.pt` file that is damaged or hostile: its tokens, or one clear error; nothing in it is ever called."""

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lerobot_lam_diffusion.reading import UnreadableError
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.pt_pickle import read_pickle
from tests.fuzz import mutations, pickles
from tests.fuzz.conftest import check_refusal

META = SimpleNamespace(
    repo_id="local/x",
    total_frames=pickles.ROWS,
    episodes={"dataset_from_index": [0, 4], "dataset_to_index": [4, pickles.ROWS]},
)


class Reader:
    """Opens one file after another; what is opened is what `torch.load` reads, where it reads the file.

    It does not where the archive is damaged beside what we need, or something unread does not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lam_tokens.pt"
        self.canary = folder / "executed"
        contents = [content for _, content in pickles.good()] + [pickles.archived(pickles.PLAIN)]
        documents = [torch.load(io.BytesIO(content), weights_only=True) for content in contents]
        self.possible = [document["tokens"].detach().float() for document in documents]

    def check(self, content: bytes) -> str:
        self.path.write_bytes(content)
        try:
            store = TokenStore.open(self.path, META)
        except TokenStoreError as error:
            assert not self.canary.exists()
            return check_refusal(error, TokenStoreError)
        assert not self.canary.exists()
        window = store.window(torch.arange(pickles.ROWS), [-1, 0])
        assert window.shape == (pickles.ROWS, 2, store.token_dim)
        assert torch.isfinite(window).all()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = torch.load(self.path, weights_only=True)["tokens"].detach().float()
        except Exception:
            assert any(torch.equal(store.values, tokens) for tokens in self.possible)
            return "opened without torch"
        assert torch.equal(store.values, expected)
        return "opened"


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    return Reader(tmp_path_factory.mktemp("pt"))


def damaged(seeds: range) -> Iterator[tuple[str, bytes]]:
    for name, whole in pickles.good():
        start = whole.index(b"\x80\x02")
        pickle = range(start, whole.index(b".PK", start) + 1)
        directory = range(whole.index(b"PK\x01\x02"), len(whole))
        for told, content in mutations.damaged(whole, seeds, [pickle, directory, range(start)]):
            yield f"{name}, {told}", content


def damaged_pickles(seeds: range) -> Iterator[tuple[str, bytes]]:
    """The pickle inside is damaged, the zip around it is whole."""
    document = {"tokens": pickles.GOOD, "metadata": {"frame_stride": 2, "list": [1, 2.5, None, ("x",)]}}
    for told, content in mutations.damaged(pickles.pickled(document), seeds):
        yield f"pickle, {told}", pickles.archived(content)


def test_tokens_open(reader, fuzz):
    assert fuzz("pt", pickles.good(), reader.check) == {"opened": 10}


def test_code_is_refused(reader, fuzz):
    counts = fuzz("pt", pickles.code(reader.canary), reader.check)
    assert counts["refused"] == counts.total() > 400
    assert not reader.canary.exists()


def test_the_canary_is_alive(reader):
    """What is refused would have been executed by a plain `pickle.load` or `torch.load`."""
    content = dict(pickles.code(reader.canary))["code os.system, metadata, protocol 2"]
    torch.load(io.BytesIO(content), weights_only=False)
    assert reader.canary.exists()
    reader.canary.unlink()


def test_hostile_files(reader, fuzz):
    counts = fuzz("pt", pickles.hostile(), reader.check)
    assert counts["refused"] > 100


def test_damaged_files(reader, fuzz):
    counts = fuzz("pt", itertools.chain(damaged(range(40)), damaged_pickles(range(400))), reader.check)
    assert counts["refused"] > 400
    assert counts["opened"] > 10


@pytest.mark.slow
def test_many_damaged_files(reader, fuzz):
    fuzz("pt", damaged(range(1000, 2000)), reader.check)
    fuzz("pt", damaged_pickles(range(1000, 11_000)), reader.check)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_no_bytes_are_a_pickle_that_fails_otherwise(content):
    with contextlib.suppress(UnreadableError):
        read_pickle(b"\x80\x02" + content + b".")
