"""Whatever bytes of a file are changed: it is refused with one clear error, or opens as what it is."""

import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.lam.config import CONFIG_FILE
from lerobot_lam_diffusion.lam.locating import WEIGHTS_FILE
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.utils.errors import LamError
from tests.fuzz.conftest import META, SMALLEST, check_refusal

FRAMES = torch.tensor([0, 1, 2, 5, 6, 7, 8])  # of the episodes that the small stores cover

places = st.one_of(st.floats(0, 0.1), st.floats(0, 1))  # the header, or anywhere
texts = st.one_of(
    st.binary(max_size=16), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"null", b"-1", b"9" * 400])
)
changes = st.lists(st.tuples(places, st.integers(0, 16), texts), min_size=1, max_size=3)


def changed(whole: bytes, spots: list[tuple[float, int, bytes]]) -> bytes:
    """`whole` where, at each spot, some bytes are replaced by others."""
    for place, length, text in spots:
        at = int(place * (len(whole) - 1))
        whole = whole[:at] + text + whole[at + length :]
    return whole


def opened[Opened](
    folder: Path, contents: dict[str, bytes], read: Callable[[Path], Opened], error: type[ValueError]
) -> Opened | None:
    """What `read` opens in a copy of `folder` with other contents; None where it refuses."""
    with tempfile.TemporaryDirectory() as parent:
        copy = Path(shutil.copytree(folder, Path(parent) / "copy"))
        for name, content in contents.items():
            (copy / name).write_bytes(content)
        try:
            return read(copy)
        except error as refusal:
            check_refusal(refusal, error)
            return None


@pytest.mark.parametrize("kind", ["store", "int8"])
@given(spots=changes)
def test_tensors_of_a_store(good, kind, spots):
    whole = (good[kind] / TENSORS_FILE).read_bytes()
    content = changed(whole, spots)
    store = opened(good[kind], {TENSORS_FILE: content}, TokenStore.open, TokenStoreError)
    assert (store is None) == (content != whole)


@given(spots=changes)
def test_provenance_of_a_store(good, spots):
    content = changed((good["store"] / PROVENANCE_FILE).read_bytes(), spots)
    store = opened(good["store"], {PROVENANCE_FILE: content}, TokenStore.open, TokenStoreError)
    if store is not None and store.frame_stride == 1:
        expected = TokenStore.open(good["store"]).window(FRAMES, [-1, 0])
        assert torch.equal(store.window(FRAMES, [-1, 0]), expected)


def check_forged(folder: Path, content: bytes) -> TokenStore | None:
    """Open a store whose provenance vouches for other tensors: they are valid, and those of the file."""
    document = json.loads((folder / PROVENANCE_FILE).read_text())
    document["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    contents = {TENSORS_FILE: content, PROVENANCE_FILE: json.dumps(document).encode()}
    store = opened(folder, contents, TokenStore.open, TokenStoreError)
    if store is not None:
        expected = safetensors.torch.load(content)
        assert torch.equal(store.values, expected["indices" if "indices" in expected else "tokens"])
        window = store.window(FRAMES, [-1, 0])
        assert window.shape == (7, 2, store.token_dim)
        assert torch.isfinite(window).all()
    return store


@pytest.mark.parametrize("kind", ["store", "int8"])
@given(spots=changes)
def test_forged_tensors_of_a_store(good, kind, spots):
    check_forged(good[kind], changed((good[kind] / TENSORS_FILE).read_bytes(), spots))


FORGED: dict[str, Callable[[dict], dict]] = {
    "moved": lambda tensor: {"data_offsets": [at + 8 for at in tensor["data_offsets"]]},
    "beyond the end": lambda tensor: {"data_offsets": [tensor["data_offsets"][0], 2**40]},
    "backwards": lambda tensor: {"data_offsets": tensor["data_offsets"][::-1]},
    "huge": lambda _: {"shape": [2**32, 2**32], "data_offsets": [0, 2**62]},
    "another shape": lambda tensor: {"shape": [*tensor["shape"], 2]},
    "turned": lambda tensor: {"shape": [1, *tensor["shape"]]},
    "another dtype": lambda tensor: {"dtype": "F64" if tensor["dtype"] != "F64" else "I64"},
    "no dtype": lambda _: {"dtype": "PICKLE"},
    "no shape": lambda _: {"shape": None},
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("kind", ["store", "int8"])
def test_forged_header_of_a_store(good, kind, change):
    whole = (good[kind] / TENSORS_FILE).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for name in sorted(header.keys() - {"__metadata__"}):
        text = json.dumps(header | {name: header[name] | change(header[name])}).encode()
        assert check_forged(good[kind], struct.pack("<Q", len(text)) + text + data) is None


@given(spots=changes)
def test_a_pt_file(good, spots):
    whole = (good["pt"] / "tokens.pt").read_bytes()

    def read(folder: Path) -> TokenStore:
        return TokenStore.open(folder / "tokens.pt", META)

    store = opened(good["pt"], {"tokens.pt": changed(whole, spots)}, read, TokenStoreError)
    if store is not None:
        expected = read(good["pt"])
        assert torch.equal(store.values, expected.values)
        assert (store.kind, store.frame_stride) == (expected.kind, expected.frame_stride)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
@given(spots=changes)
def test_a_lam(good, name, spots):
    contents = {file: (good["LAM"] / file).read_bytes() for file in (WEIGHTS_FILE, CONFIG_FILE)}
    weights = contents[WEIGHTS_FILE]
    contents[name] = changed(contents[name], spots)
    lam = opened(good["LAM"], contents, lambda folder: load_lam(folder, fdm=True), LamError)
    if lam is None:
        return
    expected = safetensors.torch.load(contents[WEIGHTS_FILE])
    for part, module in (("encoder", lam.encoder), ("vq", lam.vq), ("decoder", lam.decoder)):
        for tensor_name, tensor in module.state_dict().items():
            assert torch.isfinite(tensor).all()
            assert torch.equal(tensor, expected.pop(f"{part}.{tensor_name}").float())
    assert not expected
    # As text: a ratio of 1 for 1.0 gives the same model another fingerprint.
    same = str(lam.config.token_fields("")) == str(SMALLEST.token_fields(""))
    if contents[WEIGHTS_FILE] == weights and same:
        assert lam.fingerprint == load_lam(good["LAM"]).fingerprint
