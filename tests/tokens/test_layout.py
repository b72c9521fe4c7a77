"""Damaged, forged and hostile stores: one clear `TokenStoreError` each, never a crash."""

import pytest
import torch

from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError, layout
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.utils.errors import UserError
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
    assert "no token store at" in refusal(tmp_path / "notes.txt")


def test_altered_bytes(files):
    content = bytearray(files.tensors.read_bytes())
    content[-1] ^= 1
    files.tensors.write_bytes(content)
    told = refusal(files.folder)
    assert "its SHA-256 is" in told
    assert f"{PROVENANCE_FILE} expects {files.document()['tensors_sha256'][:16]}" in told
    assert "truncated or altered" in told


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_forged_continuous_tokens_that_are_not_finite(continuous_files, bad):
    def spoil(tensors):
        tensors["tokens"][37, 5] = bad

    continuous_files.edit_tensors(spoil)
    assert "NaN or Inf in token row 37" in refusal(continuous_files.folder)


def test_forged_codebook_that_is_not_finite(files):
    def spoil(tensors):
        tensors["codebook"][3, 0] = float("nan")

    files.edit_tensors(spoil)
    assert "NaN or Inf in codebook row 3" in refusal(files.folder)


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
def test_forged_small_tokens_that_are_not_finite(write_random, tmp_path, storage):
    files = StoreFiles(
        write_random(tmp_path / "store", [40], token_kind="continuous", storage_dtype=storage),
        tmp_path / "copy",
    )

    def spoil(tensors):
        if storage == "int8":
            tensors["row_scale"][37] = 1e38  # finite, but not times 127
        else:
            tensors["tokens"][37, 5] = float("inf")

    files.edit_tensors(spoil)
    assert "NaN or Inf in token row 37" in refusal(files.folder)


def test_rows_without_their_scale(write_random, tmp_path):
    files = StoreFiles(
        write_random(tmp_path / "store", [40], token_kind="continuous", storage_dtype="int8"),
        tmp_path / "copy",
    )
    files.edit_tensors(lambda tensors: tensors.update(row_scale=tensors["row_scale"][:39].clone()))
    assert "it has 39 rows of row_scale for 40 covered frames" in refusal(files.folder)
    files.edit_tensors(lambda tensors: tensors.pop("row_scale"))
    assert "tensor row_scale is missing" in refusal(files.folder)


def test_an_episode_that_is_both_covered_and_skipped(files):
    files.edit_document(lambda document: document.update(skipped={"3": "no video"}))
    assert f"it covers episode 3, which {PROVENANCE_FILE} calls skipped" in refusal(files.folder)


def test_a_store_longer_than_a_block_is_checked_to_its_end(write_random, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SCAN_ROWS", 7)
    files = StoreFiles(write_random(tmp_path / "store", [200], token_kind="continuous"), tmp_path / "copy")
    assert TokenStore.open(files.folder).num_frames == 200

    def spoil(tensors):
        tensors["tokens"][199, 5] = float("nan")

    files.edit_tensors(spoil)
    assert "NaN or Inf in token row 199" in refusal(files.folder)


def test_forged_index_past_the_codebook(files):
    def spoil(tensors):
        tensors["indices"][20, 1] = 16

    files.edit_tensors(spoil)
    assert "code index 16, but the codebook has 16 rows" in refusal(files.folder)


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


def test_indices_of_another_shape(files):
    def spoil(tensors):
        tensors["indices"] = tensors["indices"][:, :1].clone()

    files.edit_tensors(spoil)
    assert "indices has shape (60, 1), expected (N, 2)" in refusal(files.folder)


def test_store_with_too_few_rows(files):
    def spoil(tensors):
        tensors["indices"] = tensors["indices"][:-1].clone()

    files.edit_tensors(spoil)
    assert "it has 59 rows of tokens for 60 covered frames" in refusal(files.folder)


TABLES = {
    "gap": ("episode_from", 1, 15, "do not tile the dataset's 60 frames"),
    "late start": ("episode_from", 0, 1, "do not tile"),
    "early end": ("episode_to", 4, 59, "do not tile"),
    "another row": ("episode_row", 2, 24, "episode_row does not point at consecutive rows"),
}


@pytest.mark.parametrize(("name", "episode", "value", "expected"), TABLES.values(), ids=TABLES)
def test_forged_episode_table(files, name, episode, value, expected):
    def spoil(tensors):
        tensors[name][episode] = value

    files.edit_tensors(spoil)
    assert expected in refusal(files.folder)


def test_forged_episode_table_whose_lengths_wrap_around(files):
    huge = 2**63 - 1

    def spoil(tensors):
        tensors["episode_to"][:2] = torch.tensor([huge, -huge])
        tensors["episode_from"][1:3] = torch.tensor([huge, -huge])

    files.edit_tensors(spoil)
    assert "do not tile" in refusal(files.folder)
