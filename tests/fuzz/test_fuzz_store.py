"""A token store that is damaged or forged: what was stored, or one clear error."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lerobot_lam_diffusion.tokens import Provenance, TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.tokens.provenance import (
    CONTINUOUS,
    CONTINUOUS_STORAGE,
    VQ,
    DatasetInfo,
    LamInfo,
)
from lerobot_lam_diffusion.tokens.writer import write_store
from tests.fuzz import mutations
from tests.fuzz.conftest import check_refusal

LENGTHS = torch.tensor([3, 2, 4])
COVERED = torch.tensor([True, False, True])
OLD = Path(__file__).parents[1] / "tokens" / "data"


def write(folder: Path, kind: str, storage_dtype: str) -> TokenStore:
    torch.manual_seed(0)
    codebook = torch.rand(5, 4) + 1
    values = torch.randint(5, (7, 2)) if kind == VQ else torch.rand(7, 8) + 1
    provenance = Provenance(
        dataset=DatasetInfo("local/x", None, 9, 3, 10, "digest"),
        lam=LamInfo("some/lam", None, "fingerprint", 2, 4, 5, 1.0),
        camera_key="observation.images.top",
        frame_stride=1,
        stride_seconds=0.1,
        token_kind=kind,
        dtype="float32",
        versions={"torch": "2"},
        storage_dtype=storage_dtype,
        skipped={"1": "no frame"},
    )
    stop = LENGTHS.cumsum(0)
    return write_store(folder, provenance, [values], codebook, stop - LENGTHS, stop, COVERED)


class Reader:
    """Opens one damaged copy after another of one store."""

    def __init__(self, store: TokenStore, copies: Path) -> None:
        self.store = store
        self.tensors = (store.path / TENSORS_FILE).read_bytes()
        self.provenance = (store.path / PROVENANCE_FILE).read_bytes()
        self._folders = (copies / str(number) for number in itertools.count())

    def with_tensors(self, content: bytes) -> str:
        return self._try(content, self.provenance)

    def with_provenance(self, content: bytes) -> str:
        return self._try(self.tensors, content)

    def forged(self, content: bytes) -> str:
        """The provenance vouches for the damaged tensors, as somebody's would who wants them to be read."""
        document = json.loads(self.provenance) | {"tensors_sha256": hashlib.sha256(content).hexdigest()}
        return self._try(content, json.dumps(document).encode())

    def _try(self, tensors: bytes, provenance: bytes) -> str:
        folder = next(self._folders)
        folder.mkdir(parents=True)
        try:
            (folder / TENSORS_FILE).write_bytes(tensors)
            (folder / PROVENANCE_FILE).write_bytes(provenance)
            return self.check(folder, tensors)
        finally:
            shutil.rmtree(folder)

    def check(self, folder: Path, tensors: bytes) -> str:
        try:
            store = TokenStore.open(folder)
        except TokenStoreError as error:
            return check_refusal(error, TokenStoreError)
        expected = safetensors.torch.load(tensors)
        assert torch.equal(store.values, expected["indices" if store.kind == VQ else "tokens"])
        covered = torch.cat(
            [
                torch.arange(start, stop)
                for start, stop, row in zip(
                    store.episode_from.tolist(),
                    store.episode_to.tolist(),
                    store.episode_row.tolist(),
                    strict=True,
                )
                if row >= 0
            ]
        )
        window = store.window(covered, [-1, 0])
        assert window.shape == (len(covered), 2, store.token_dim)
        assert torch.isfinite(window).all()
        if tensors == self.tensors and store.frame_stride == self.store.frame_stride:
            assert torch.equal(window, self.store.window(covered, [-1, 0]))
        assert store.frames_with_tokens().shape == (store.num_tokens,)
        store.code_perplexity()
        store.coverage.encode()
        return "opened"


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, Reader]:
    folder = tmp_path_factory.mktemp("stores")
    stores = {kind: write(folder / kind, CONTINUOUS, kind) for kind in CONTINUOUS_STORAGE}
    stores |= {"vq": write(folder / "vq", VQ, "uint8")}
    for name in ("v1_vq", "v1_continuous"):
        shutil.copytree(OLD / name, folder / name)
        stores[name] = TokenStore.open(folder / name)
    return {name: Reader(store, folder / "copies" / name) for name, store in stores.items()}


def damaged_tensors(reader: Reader) -> Iterator[tuple[str, bytes]]:
    header = range(8 + int.from_bytes(reader.tensors[:8], "little"))
    return mutations.damaged(reader.tensors, range(60), [range(9), header])


def each(
    readers: dict[str, Reader], make: Callable[[Reader], Iterator[tuple[str, bytes]]], method: str
) -> Iterator[tuple[str, tuple[Callable[[bytes], str], bytes]]]:
    for name, reader in readers.items():
        for told, content in make(reader):
            yield f"{name}, {method}, {told}", (getattr(reader, method), content)


def run(call: tuple[Callable[[bytes], str], bytes]) -> str:
    method, content = call
    return method(content)


def test_good_ones_open(readers, fuzz):
    inputs = [
        *each(readers, lambda reader: iter([("good", reader.tensors)]), "forged"),
        *each(readers, lambda reader: iter([("good", reader.provenance)]), "with_provenance"),
    ]
    assert fuzz("store", inputs, run) == {"opened": len(inputs)}


def test_damaged_tensors_are_refused(readers, fuzz):
    """All of them: a hash stands in the provenance."""

    def make(reader: Reader) -> Iterator[tuple[str, bytes]]:
        return ((told, content) for told, content in damaged_tensors(reader) if content != reader.tensors)

    counts = fuzz("store", each(readers, make, "with_tensors"), run)
    assert counts["refused"] == counts.total() > 150


@pytest.mark.slow
def test_forged_tensors(readers, fuzz):
    some = {name: readers[name] for name in ("vq", "int8")}
    headers = each(some, lambda reader: mutations.forged_headers(reader.tensors), "forged")
    damaged = each(readers, damaged_tensors, "forged")
    counts = fuzz("store", itertools.chain(headers, damaged), run)
    assert counts["refused"] > 400
    assert counts["opened"] > 10


@pytest.mark.slow
def test_damaged_provenance(readers, fuzz):
    reader = readers["vq"]
    every = list(mutations.damaged_json(json.loads(reader.provenance)))
    contents = [(f"content {number}", content) for number, content in enumerate(mutations.JSON_CONTENTS)]
    contents.append(("8 MB of lists", b"[" + b"[]," * 2_600_000 + b"[]]"))
    inputs = [*every[::4], *contents, *mutations.damaged(reader.provenance, range(100))]
    counts = fuzz("provenance", inputs, reader.with_provenance)
    assert counts["refused"] > 300
    assert counts["opened"] > 10


@pytest.mark.slow
def test_every_value_of_the_provenance(readers, fuzz):
    def make(reader: Reader) -> Iterator[tuple[str, bytes]]:
        return mutations.damaged_json(json.loads(reader.provenance))

    some = {name: readers[name] for name in ("vq", "int8", "v1_continuous")}
    fuzz("provenance", each(some, make, "with_provenance"), run)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=100))
def test_no_bytes_are_a_provenance_that_fails_otherwise(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(TokenStoreError, match="again with lerobot-lam-precompute"):
        Provenance.read(tmp_path / "x.json")
