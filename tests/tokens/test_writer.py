"""A store appears whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
import torch

from lerobot_lam_diffusion.tokens import TokenStore, writer
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS_STORAGE
from lerobot_lam_diffusion.tokens.writer import write_store
from lerobot_lam_diffusion.utils import files
from lerobot_lam_diffusion.utils.files import refuse_existing

LENGTHS = [4, 5]


def failing(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


def test_a_store_is_two_files(write_random, tmp_path):
    store = write_random(tmp_path / "new" / "folders" / "store", LENGTHS)
    assert {path.name for path in store.path.iterdir()} == {TENSORS_FILE, PROVENANCE_FILE}
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


@pytest.mark.parametrize(
    ("module", "where"),
    [(writer, "save_file"), (writer, "sha256_of"), (files, "fsync"), (files, "_rename_new")],
)
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"]
)
def test_a_failure_while_writing_leaves_nothing(write_random, tmp_path, monkeypatch, module, where, error):
    monkeypatch.setattr(module, where, failing(error))
    with pytest.raises(type(error)):
        write_random(tmp_path / "store", LENGTHS)
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    assert write_random(tmp_path / "store", LENGTHS)


def test_an_empty_folder_is_filled(write_random, tmp_path):
    (tmp_path / "store").mkdir()
    assert len(write_random(tmp_path / "store", LENGTHS).values) == 9


def test_an_empty_folder_onto_which_nothing_can_be_renamed(write_random, tmp_path, monkeypatch):
    rename = Path.rename

    def onto_nothing(self, target):
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", onto_nothing)
    (tmp_path / "store").mkdir()
    assert len(write_random(tmp_path / "store", LENGTHS).values) == 9


def test_a_file_system_that_maps_no_files_is_told(write_random, tmp_path, monkeypatch):
    def unmapped(*_, **__):
        raise RuntimeError("unable to mmap 9 bytes from file: No such device (19)")

    monkeypatch.setattr(torch, "from_file", unmapped)
    with pytest.raises(OSError, match=r"cannot be mapped into memory .*choose an --output_dir on another"):
        write_random(tmp_path / "store", LENGTHS)
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(FileExistsError, match=r"exists already.*; choose another --output_dir"):
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


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    """As `docker run -v …:/tokens` makes one: a finished folder could not be renamed to it."""
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(FileExistsError, match="is a mount point"):
        refuse_existing(tmp_path)
    refuse_existing(tmp_path / "store")


def blocks_to(make_provenance, folder, blocks, **changes):
    """Writes blocks of rows as a store of two episodes, 4 and 5 frames long."""
    start, stop = torch.tensor([0, 4]), torch.tensor([4, 9])
    covered = torch.ones(2, dtype=torch.bool)
    provenance = make_provenance(LENGTHS, **changes)
    return write_store(folder, provenance, blocks, torch.ones(16, 4), start, stop, covered)


def test_blocks_may_be_cut_anywhere(make_provenance, tmp_path):
    codes = torch.randint(16, (9, 2), generator=torch.Generator().manual_seed(0))
    one = blocks_to(make_provenance, tmp_path / "one", [codes])
    other = blocks_to(make_provenance, tmp_path / "other", iter([codes[:1], codes[1:1], codes[1:]]))
    assert torch.equal(one.values.long(), codes)
    for name in (TENSORS_FILE, PROVENANCE_FILE):
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes()


REFUSED = {
    "few rows": ([torch.zeros(8, 2).int()], {}, "8 rows of indices, expected 9"),
    "many rows": ([torch.zeros(9, 2).int(), torch.zeros(1, 2).int()], {}, "10 rows of indices, expected 9"),
    "other width": (
        [torch.zeros(9, 3).int()],
        {},
        r"are torch.uint8 \(3,\), expected torch.uint8 \(2,\)",
    ),
    "past the codebook": ([torch.full((9, 2), 16)], {}, "16 to 16, but the codebook has 16 rows"),
    "no indices": ([torch.zeros(9, 2)], {}, "code indices are torch.float32, expected integers"),
    "NaN": ([torch.full((9, 8), float("nan"))], {"token_kind": "continuous"}, "tokens hold NaN or Inf"),
    "unknown storage": (
        [torch.zeros(9, 8)],
        {"token_kind": "continuous", "storage_dtype": "int4"},
        "cannot be stored as 'int4'; expected one of .*'int8'",
    ),
    "float16's range": (
        [torch.full((9, 8), 7e4)],
        {"token_kind": "continuous", "storage_dtype": "float16"},
        r"holds the number 7e\+04, more than float16 can; store them with --storage_dtype=float32, or bfl",
    ),
}


@pytest.mark.parametrize(("blocks", "changes", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    make_provenance, tmp_path, blocks, changes, expected
):
    with pytest.raises(ValueError, match=expected):
        blocks_to(make_provenance, tmp_path / "store", blocks, **changes)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("storage", CONTINUOUS_STORAGE)
def test_the_largest_error_is_that_of_what_is_read_back(make_provenance, tmp_path, storage):
    tokens = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    tokens[3] = 0.0
    store = blocks_to(
        make_provenance, tmp_path / storage, tokens.split(4), token_kind="continuous", storage_dtype=storage
    )
    read = store.decode(torch.arange(9))
    assert float((read - tokens).abs().max()) == store.provenance.max_error
    assert (store.provenance.max_error == 0) == (storage == "float32")
    assert not read[3].any()


def test_vq_tokens_have_one_storage_whatever_is_wanted(write_random, tmp_path):
    assert write_random(tmp_path / "a", LENGTHS, storage_dtype="int8").provenance.storage_dtype == "uint8"
    wide = write_random(tmp_path / "b", LENGTHS, num_codes=300).provenance
    assert (wide.storage_dtype, wide.max_error) == ("uint16", 0.0)


def test_a_store_that_another_process_made_meanwhile_stays(make_provenance, write_random, tmp_path):
    def blocks():
        write_random(tmp_path / "store", LENGTHS)
        yield torch.zeros(9, 2, dtype=torch.int64)

    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        blocks_to(make_provenance, tmp_path / "store", blocks())
    assert TokenStore.open(tmp_path / "store").values.any()
    assert os.listdir(tmp_path) == ["store"]
