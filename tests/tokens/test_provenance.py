"""`lam_tokens.json`: what a store says about itself, and what it refuses to believe."""

import copy
import importlib.metadata
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

from lerobot_lam_diffusion.tokens import Provenance, TokenStore, TokenStoreError
from tests.conftest import FPS, TOP

REMEDY = "lerobot-lam-precompute"


def refusal(files) -> str:
    with pytest.raises(TokenStoreError) as error:
        TokenStore.open(files.folder)
    assert str(files.provenance) in str(error.value)
    return str(error.value)


def keys(kind: type = Provenance, prefix: tuple = ()) -> list[tuple[str, ...]]:
    """All keys of the document, nested ones as `("dataset", "fps")`."""
    found = []
    for field in fields(kind):
        found.append((*prefix, field.name))
        if is_dataclass(field.type):
            found += keys(field.type, found[-1])
    return found


def put(document: dict, key: tuple[str, ...], value: object) -> dict:
    document = copy.deepcopy(document)
    place = document
    for name in key[:-1]:
        place = place[name]
    place[key[-1]] = value
    return document


def test_a_store_tells_where_its_tokens_come_from(store, dataset, lam, lam_folder):
    told = store.provenance
    assert (told.dataset.repo_id, told.dataset.total_frames, told.dataset.total_episodes) == (
        "local/squares",
        60,
        5,
    )
    assert told.dataset.fps == FPS
    assert told.dataset.revision == dataset.meta.revision
    assert len(told.dataset.digest) == 64
    assert (told.lam.path, told.lam.fingerprint) == (str(lam_folder), lam.fingerprint)
    assert (told.lam.num_learned_tokens, told.lam.action_latent_dim, told.lam.num_codes) == (2, 32, 16)
    assert told.lam.token_scale == pytest.approx(lam.codebook.square().mean().sqrt().item())
    assert (told.camera_key, told.frame_stride, told.stride_seconds) == (TOP, 1, 1 / FPS)
    assert (told.token_kind, told.dtype, told.context) == ("vq", "float32", "pair")
    assert told.versions["lerobot"] == importlib.metadata.version("lerobot")
    assert (told.storage_dtype, told.max_error, told.skipped) == ("uint8", 0.0, {})
    assert len(told.tensors_sha256) == 64


@pytest.mark.parametrize("kind", ["vq", "continuous"])
def test_a_store_of_format_version_1_is_read_forever(kind):
    """Made by version 0.1.0 of this package: codes (3 * row + 5 * slot) mod 8, tokens row + column / 4."""
    opened = TokenStore.open(Path(__file__).parent / "data" / f"v1_{kind}")
    row, slot = torch.arange(7).unsqueeze(1), torch.arange(2)
    if kind == "vq":
        codes = (3 * row + 5 * slot) % 8
        expected = (codes.unsqueeze(-1) + torch.arange(4) / 4).flatten(1)
    else:
        expected = row + torch.arange(8) / 4
    expected[[0, 3]] = 0.0  # their episodes' first frames
    frames = torch.tensor([0, 1, 2, 5, 6, 7, 8])
    assert torch.equal(opened.window(frames, [0])[:, 0], expected)
    assert opened.missing_episodes == [1]
    told = opened.provenance
    assert told.storage_dtype == {"vq": "uint8", "continuous": "float32"}[kind]
    assert (told.max_error, told.device, told.skipped) == (0.0, "unknown", {})


def test_provenance_survives_being_written_and_read(tmp_path, make_provenance):
    provenance = make_provenance([3, 4], frame_stride=5, storage_dtype="uint8", skipped={"1": "cut"})
    (tmp_path / "x.json").write_text(provenance.to_json())
    assert Provenance.read(tmp_path / "x.json") == provenance


@pytest.mark.parametrize("key", keys(), ids=".".join)
def test_missing_key(files, key):
    def drop(document):
        for name in key[:-1]:
            document = document[name]
        del document[key[-1]]

    files.edit_document(drop)
    told = refusal(files)
    assert f"{'.'.join(key)} is missing" in told
    assert REMEDY in told


WRONG = {
    "text for a number": (("frame_stride",), "1", "frame_stride is '1', expected int"),
    "fraction for a count": (("dataset", "total_frames"), 60.5, "dataset.total_frames is 60.5, expected int"),
    "true for a count": (("lam", "num_codes"), True, "lam.num_codes is True, expected int"),
    "number for text": (("camera_key",), 7, "camera_key is 7, expected str"),
    "list for an object": (("lam",), [], "lam is not an object"),
    "null for text": (("lam", "fingerprint"), None, "lam.fingerprint is None, expected str"),
    "versions": (("versions",), {"torch": 2}, "versions is {'torch': 2}, expected dict[str, str]"),
    "zero": (("frame_stride",), 0, "frame_stride is 0, which no store has"),
    "negative": (("dataset", "total_episodes"), -1, "dataset.total_episodes is -1, which no store has"),
    "past int64": (("frame_stride",), 10**30, "which no store has"),
    "kind": (("token_kind",), "pickle", "token_kind is 'pickle', which no store has"),
    "no codes": (("lam", "num_codes"), 0, "lam.num_codes is 0, which no store has"),
    "scale": (("lam", "token_scale"), 0, "lam.token_scale is 0, which no store has"),
    "NaN": (("lam", "token_scale"), float("nan"), "lam.token_scale is nan, expected float"),
    "Inf": (("dataset", "fps"), float("inf"), "dataset.fps is inf, expected float"),
    "storage": (("storage_dtype",), "int8", "storage_dtype is 'int8', which no store has"),
    "error": (("max_error",), -0.5, "max_error is -0.5, which no store has"),
    "skipped": (("skipped",), {"5": "gone"}, "skipped is {'5': 'gone'}, which no store has"),
    "skipped without a number": (("skipped",), {"one": "gone"}, "skipped is {'one': 'gone'}"),
    "past float": (("dataset", "fps"), 10**400, "expected float"),
}


@pytest.mark.parametrize(("key", "value", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_value(files, key, value, expected):
    files.write_document(put(files.document(), key, value))
    told = refusal(files)
    assert expected in told
    assert REMEDY in told


def test_a_newer_format_needs_a_newer_package(files):
    files.edit_document(lambda document: document.update(format_version=4, fields_of_the_future={}))
    told = refusal(files)
    assert "has format version 4" in told
    assert "reads versions up to 3" in told
    assert told.endswith("pip install --upgrade lerobot_policy_diffusion_lam")


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.0, True])
def test_impossible_format_version(files, version):
    files.edit_document(lambda document: document.update(format_version=version))
    told = refusal(files)
    assert f"format_version is {version!r}, expected a positive integer" in told
    assert REMEDY in told


@pytest.mark.parametrize(
    "document", [[], "store", None, {}, {"format": "another.format", "format_version": 1}]
)
def test_not_our_format(files, document):
    files.write_document(document)
    told = refusal(files)
    assert 'expected "format": "lerobot_lam_diffusion.token_store"' in told
    assert REMEDY in told


@pytest.mark.parametrize("content", [b"", b'{"format": "lerobot_lam', b"\xff\xfe\x00", b"[" * 200_000])
def test_unreadable_json(files, content):
    files.provenance.write_bytes(content)
    told = refusal(files)
    assert "is not readable as JSON" in told
    assert REMEDY in told
