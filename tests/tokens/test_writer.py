"""A store appears whole or not at all."""

import os
import stat

import pytest
import torch

from lerobot_lam_diffusion.tokens import TokenStore, writer
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.tokens.writer import codebook_scale, index_dtype, refuse_existing

LENGTHS = [4, 5]


def failing(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


def test_a_store_is_two_files_that_others_may_read(write_random, tmp_path):
    store = write_random(tmp_path / "new" / "folders" / "store", LENGTHS)
    assert {path.name for path in store.path.iterdir()} == {TENSORS_FILE, PROVENANCE_FILE}
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (store.path, *store.path.iterdir())]
    assert modes == [0o755, 0o644, 0o644]
    assert os.listdir(store.path.parent) == ["store"]


def test_writing_twice_gives_the_same_bytes(write_random, tmp_path):
    first, second = (write_random(tmp_path / name, LENGTHS) for name in ("first", "second"))
    for name in (TENSORS_FILE, PROVENANCE_FILE):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


def test_vq_costs_a_byte_a_slot(write_random, tmp_path):
    small, large = (
        (write_random(tmp_path / str(n), [n]).path / TENSORS_FILE).stat().st_size for n in (1000, 11_000)
    )
    assert abs(large - small - 2 * 10_000) < 64


@pytest.mark.parametrize("where", ["save_file", "sha256_of", "_flush"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"]
)
def test_a_failure_while_writing_leaves_nothing(write_random, tmp_path, monkeypatch, where, error):
    monkeypatch.setattr(writer, where, failing(error))
    with pytest.raises(type(error)):
        write_random(tmp_path / "store", LENGTHS)
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    assert write_random(tmp_path / "store", LENGTHS)


def test_what_a_killed_writer_left_is_no_hindrance(write_random, tmp_path):
    (tmp_path / f".store.partial-{os.getpid()}").mkdir()
    assert write_random(tmp_path / "store", LENGTHS)


def test_an_empty_folder_is_filled(write_random, tmp_path):
    (tmp_path / "store").mkdir()
    assert len(write_random(tmp_path / "store", LENGTHS).values) == 9


def test_the_current_folder_and_a_link_to_a_folder_are_filled(write_random, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_random(writer.Path(), LENGTHS)
    assert len(TokenStore.open(tmp_path / "here").values) == 9

    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_random(tmp_path / "link", LENGTHS)
    assert len(TokenStore.open(tmp_path / "target").values) == 9


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_already_is_not_touched(write_random, tmp_path, kind):
    path = tmp_path / "store"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        FileExistsError, match=r"exists already and is not empty; choose another --output_dir"
    ):
        write_random(path, LENGTHS)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_where_no_folder_can_be_made_is_refused_early(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file is a file; choose another --output_dir"):
        refuse_existing(tmp_path / "file" / "a" / "store")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_is_not_writable_is_refused_early(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="is not writable; choose another --output_dir"):
        refuse_existing(tmp_path / "a" / "store")


def test_the_smallest_index_that_holds_the_codebook():
    assert index_dtype(256) == torch.uint8
    assert index_dtype(257) == index_dtype(65536) == torch.uint16
    with pytest.raises(ValueError, match="codebook of 65537 rows, expected at most 65536"):
        index_dtype(65537)


def test_codebook_scale_is_the_root_mean_square():
    assert codebook_scale(torch.tensor([[3.0, 0.0], [4.0, 5.0]])) == pytest.approx((50 / 4) ** 0.5)
    assert codebook_scale(torch.zeros(2, 2)) == 1.0
