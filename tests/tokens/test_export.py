"""Stores as files of other formats: the same tokens, whole or not at all."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lerobot_lam_diffusion.tokens import TokenStore, export
from lerobot_lam_diffusion.tokens.export import FORMATS, PARQUET_PROVENANCE, export_store
from lerobot_lam_diffusion.utils import files
from lerobot_lam_diffusion.utils.errors import UserError


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """So that 60 frames are several blocks."""
    monkeypatch.setattr(export, "BLOCK_ROWS", 7)


def tokens_of(store) -> torch.Tensor:
    return store.window(torch.arange(store.num_frames), [0])[:, 0]


@pytest.mark.parametrize("kind", ["store", "continuous_store"])
def test_npy_has_a_row_for_each_frame(kind, tmp_path, request):
    store = request.getfixturevalue(kind)
    export_store(store, tmp_path / "new" / "x.npy", "npy")
    read = np.load(tmp_path / "new" / "x.npy", mmap_mode="r")
    assert read.dtype == np.float32
    assert np.array_equal(read, tokens_of(store).numpy())
    np.save(tmp_path / "theirs.npy", tokens_of(store).numpy())
    assert (tmp_path / "new" / "x.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    assert os.listdir(tmp_path / "new") == ["x.npy"]


@pytest.mark.parametrize("kind", ["store", "continuous_store"])
@pytest.mark.parametrize("stride", [1, 3])
def test_pt_is_read_back_as_the_same_tokens(kind, stride, make_store, dataset, tmp_path):
    store = make_store(dataset, use_vq_tokens=kind == "store", frame_stride=stride)
    export_store(store, tmp_path / "x.pt", "pt")
    read = TokenStore.open(tmp_path / "x.pt", dataset.meta)
    index = torch.arange(60)
    assert torch.equal(read.window(index, [-1, 0]), store.window(index, [-1, 0]))
    assert (read.kind, read.frame_stride) == (store.kind, stride)
    document = torch.load(tmp_path / "x.pt", weights_only=True)
    assert document["tokens"].dtype == torch.float32
    told = document["metadata"]
    assert told["lam_fingerprint"] == store.provenance.lam.fingerprint
    assert told["camera_key"] == store.provenance.camera_key
    assert {type(value) for value in told.values()} <= {str, int, float, bool}


def test_parquet_tells_each_frames_numbers_and_codes(store, dataset, tmp_path):
    export_store(store, tmp_path / "x.parquet", "parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    numbers = dataset.hf_dataset.with_format(None)
    for name in ("index", "episode_index", "frame_index"):
        assert table[name].to_pylist() == list(numbers[name])
    tokens = np.array(table["observation.lam_tokens"].to_pylist(), np.float32)
    assert np.array_equal(tokens, tokens_of(store).numpy())
    has_token = np.array(table["has_token"].to_pylist())
    assert np.flatnonzero(has_token).tolist() == store.frames_with_tokens().tolist()
    codes = table["lam_indices"].to_pylist()
    assert [code is not None for code in codes] == has_token.tolist()
    assert [code for code in codes if code] == store.values[torch.from_numpy(has_token)].tolist()
    told = (store.path / "lam_tokens.json").read_bytes()
    assert table.schema.metadata[PARQUET_PROVENANCE] == told
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 9


def test_parquet_of_a_partial_store_has_its_frames_only(partial_store, tmp_path):
    export_store(partial_store, tmp_path / "x.parquet", "parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["index"].to_pylist() == [*range(14, 23), *range(40, 48)]
    assert table["frame_index"].to_pylist() == [*range(9), *range(8)]


def test_parquet_of_continuous_tokens_has_no_codes(continuous_store, tmp_path):
    export_store(continuous_store, tmp_path / "x.parquet", "parquet")
    assert "lam_indices" not in pq.read_schema(tmp_path / "x.parquet").names


@pytest.mark.parametrize("format", ["pt", "npy"])
def test_a_partial_store_does_not_pass_missing_episodes_off_as_zeros(partial_store, tmp_path, format):
    with pytest.raises(UserError, match=r"is partial .*\(1, 3\).*Export it with --format=parquet"):
        export_store(partial_store, tmp_path / "x", format)
    assert os.listdir(tmp_path) == []


def test_a_pt_file_is_no_store(store, dataset, tmp_path):
    export_store(store, tmp_path / "x.pt", "pt")
    with pytest.raises(UserError, match="is an exported file already, not a token store"):
        export_store(TokenStore.open(tmp_path / "x.pt", dataset.meta), tmp_path / "x.npy", "npy")


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_there_already_is_not_touched(store, tmp_path, format):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError, match="x exists already; choose another --output or remove it"):
        export_store(store, tmp_path / "x", format)
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("format", FORMATS)
def test_a_failure_leaves_nothing(store, tmp_path, monkeypatch, format):
    def fail(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        export_store(store, tmp_path / "x", format)
    assert os.listdir(tmp_path) == []
