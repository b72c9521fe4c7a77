"""A store is read from end to end once, whichever process opens it, until one of its files changes."""

import os
import shutil

import pytest

from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError, checked, layout


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Files that were read from end to end; stamps lie in a folder of their own."""
    monkeypatch.setattr(checked, "HF_LEROBOT_HOME", tmp_path / "home")
    monkeypatch.setattr(checked, "_noted", {})
    paths = []
    read = layout.sha256_of
    monkeypatch.setattr(layout, "sha256_of", lambda path: paths.append(path) or read(path))
    return paths


@pytest.fixture
def new_process(monkeypatch):
    """What this process remembers is forgotten, stamps stay."""
    return lambda: monkeypatch.setattr(checked, "_noted", {})


def stamps(tmp_path):
    return list((tmp_path / "home").rglob("checked/*"))


def test_it_is_read_once_on_a_machine(files, reads, new_process, tmp_path, monkeypatch):
    TokenStore.open(files.folder)
    assert reads == [files.tensors]
    new_process()
    TokenStore.open(str(files.folder) + "/")
    monkeypatch.chdir(files.folder)
    TokenStore.open(".")
    (tmp_path / "link").symlink_to(files.folder)
    TokenStore.open(tmp_path / "link")
    assert len(reads) == 1
    assert len(stamps(tmp_path)) == 1


@pytest.mark.parametrize("name", ["tensors", "provenance"])
@pytest.mark.parametrize("change", ["time", "inode"])
def test_a_file_that_looks_different_is_read_again(files, reads, name, change):
    TokenStore.open(files.folder)
    path = getattr(files, name)
    if change == "time":
        os.utime(path, ns=(0, 0))
    else:
        shutil.copy2(path, path.with_suffix(".copy"))
        os.replace(path.with_suffix(".copy"), path)
    TokenStore.open(files.folder)
    TokenStore.open(files.folder)
    assert len(reads) == 2


def test_damage_is_found_after_a_good_check(files, reads):
    TokenStore.open(files.folder)
    content = bytearray(files.tensors.read_bytes())
    content[-1] ^= 1
    files.tensors.write_bytes(content)
    for _ in range(2):  # and a failed check leaves no stamp
        with pytest.raises(TokenStoreError, match="its SHA-256 is"):
            TokenStore.open(files.folder)


def test_the_writer_has_seen_every_byte_itself(write_random, reads, new_process, tmp_path):
    store = write_random(tmp_path / "store", [4, 5])
    new_process()
    TokenStore.open(store.path)
    assert reads == []


def test_it_can_be_read_again_in_any_case(files, reads):
    layout.check_content(files.folder)
    layout.check_content(files.folder, again=True)
    assert len(reads) == 2


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"format": 0}'])
def test_a_damaged_stamp_costs_a_check(files, reads, new_process, tmp_path, content):
    TokenStore.open(files.folder)
    (stamp,) = stamps(tmp_path)
    stamp.write_bytes(content)
    new_process()
    TokenStore.open(files.folder)
    new_process()
    TokenStore.open(files.folder)
    assert len(reads) == 2


def test_a_home_that_cannot_be_written_costs_a_check_in_each_process(files, reads, new_process, tmp_path):
    (tmp_path / "home").write_text("not a folder")
    TokenStore.open(files.folder)
    TokenStore.open(files.folder)
    assert len(reads) == 1
    new_process()
    TokenStore.open(files.folder)
    assert len(reads) == 2


def test_a_copy_is_another_store(files, reads, tmp_path):
    TokenStore.open(files.folder)
    shutil.copytree(files.folder, tmp_path / "another")
    TokenStore.open(tmp_path / "another")
    assert len(reads) == 2
