"""Damaged, forged and hostile stores: one clear `TokenStoreError` each, never a crash."""

import pytest
import torch

from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError, layout
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import EPISODE_LENGTHS
from tests.tokens.conftest import StoreFiles

REMEDY = "lerobot-lam-precompute"


def refusal(path) -> str:
    with pytest.raises(TokenStoreError) as error:
        TokenStore.open(path)
    assert isinstance(error.value, UserError)
    assert REMEDY in str(error.value)
    return str(error.value)


def test_missing_store(tmp_path):
    told = refusal(tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'} does not exist" in told
    assert f"Expected a folder with {TENSORS_FILE} and {PROVENANCE_FILE}" in told


def test_empty_folder(tmp_path):
    assert f"has no {TENSORS_FILE} and no {PROVENANCE_FILE}" in refusal(tmp_path)


@pytest.mark.parametrize("name", [TENSORS_FILE, PROVENANCE_FILE])
def test_one_of_the_two_files_is_missing(files, name):
    (files.folder / name).unlink()
    told = refusal(files.folder)
    assert f"has no {name}." in told
    assert refusal(files.folder / name)  # named by its file


def test_a_file_that_is_no_store(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt is a file" in refusal(tmp_path / "notes.txt")


def put(name, at, value):
    def change(tensors):
        tensors[name][at] = value

    return change


def cut(name, rows):
    def change(tensors):
        tensors[name] = tensors[name][rows].clone()

    return change


def wrap_around(tensors):
    """Their sum is right: int64 overflows."""
    huge = 2**63 - 1
    tensors["episode_to"][:2] = torch.tensor([huge, -huge])
    tensors["episode_from"][1:3] = torch.tensor([huge, -huge])


NAN, INF = float("nan"), float("inf")
FORGED = {
    "NaN": ("float32", put("tokens", (37, 5), NAN), "NaN or Inf in token row 37"),
    "Inf": ("float32", put("tokens", (37, 5), -INF), "NaN or Inf in token row 37"),
    "past a block": ("float32", put("tokens", (59, 5), NAN), "NaN or Inf in token row 59"),
    "half": ("float16", put("tokens", (37, 5), INF), "NaN or Inf in token row 37"),
    "bfloat16": ("bfloat16", put("tokens", (37, 5), INF), "NaN or Inf in token row 37"),
    "scale that is finite, but not times 127": ("int8", put("row_scale", 37, 1e38), "Inf in token row 37"),
    "few scales": ("int8", cut("row_scale", slice(39)), "39 rows of row_scale for 60 covered frames"),
    "no scales": ("int8", lambda tensors: tensors.pop("row_scale"), "tensor row_scale is missing"),
    "codebook": ("", put("codebook", (3, 0), NAN), "NaN or Inf in codebook row 3"),
    "index": ("", put("indices", (20, 1), 16), "code index 16, but the codebook has 16 rows"),
    "shape": ("", cut("indices", (..., slice(1))), "indices has shape (60, 1), expected (N, 2)"),
    "few rows": ("", cut("indices", slice(59)), "it has 59 rows of tokens for 60 covered frames"),
    "gap": ("", put("episode_from", 1, 15), "the episodes do not tile the dataset's 60 frames"),
    "late start": ("", put("episode_from", 0, 1), "do not tile"),
    "early end": ("", put("episode_to", 4, 59), "do not tile"),
    "lengths": ("", wrap_around, "do not tile"),
    "another row": ("", put("episode_row", 2, 24), "episode_row does not point at consecutive rows"),
}


@pytest.mark.parametrize(("storage", "change", "expected"), FORGED.values(), ids=FORGED)
def test_forged_tensors(write_random, tmp_path, monkeypatch, storage, change, expected):
    """Their provenance vouches for them; they are read in several blocks."""
    monkeypatch.setattr(layout, "SCAN_ROWS", 7)
    kind = {"token_kind": "continuous", "storage_dtype": storage} if storage else {}
    files = StoreFiles(write_random(tmp_path / "store", EPISODE_LENGTHS, **kind), tmp_path / "copy")
    assert TokenStore.open(files.folder).num_frames == 60
    files.edit_tensors(change)
    assert expected in refusal(files.folder)


def test_an_episode_that_is_both_covered_and_skipped(files):
    files.edit_document(lambda document: document.update(skipped={"3": "no video"}))
    assert f"it covers episode 3, which {PROVENANCE_FILE} calls skipped" in refusal(files.folder)


def test_every_misfit_of_the_tensors_is_told_at_once(files):
    def spoil(tensors):
        del tensors["codebook"]
        tensors["indices"] = tensors["indices"].to(torch.int32)
        tensors["episode_row"] = tensors["episode_row"][:3].clone()
        tensors["extra"] = torch.zeros(2)

    files.edit_tensors(spoil)
    told = refusal(files.folder)
    assert "tensor codebook is missing" in told
    assert "unexpected tensor 'extra'" in told
    assert "indices is torch.int32, expected torch.uint8" in told
    assert "episode_row has shape (3,), expected (5)" in told
