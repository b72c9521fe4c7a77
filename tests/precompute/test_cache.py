"""The cache of token stores: one process builds, the others wait; nothing in use is removed."""

import os
import shutil
import signal
import time
from dataclasses import replace

import pytest

from lerobot_lam_diffusion.precompute.cache import CacheEntry, cache_name, cached_entries
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE, unfinished_folder
from lerobot_lam_diffusion.utils.errors import ExtractionError
from tests.conftest import TOP
from tests.precompute import building, interrupted

PAIRS = 55


@pytest.fixture(scope="module")
def server():
    return interrupted.server()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "stores"


def put(cache, store, name=building.NAME):
    """A store that was built at some time."""
    shutil.copytree(store.path, cache / name)
    return CacheEntry(cache, name)


def unused(entry, days):
    then = time.time() - days * 86400
    for place in (entry.folder / PROVENANCE_FILE, entry.folder):
        os.utime(place, (then, then))


def test_whatever_decides_the_tokens_names_another_store(store):
    made = store.provenance
    others = [
        replace(made, dataset=replace(made.dataset, frames="another")),
        replace(made, dataset=replace(made.dataset, total_frames=61)),
        replace(made, dataset=replace(made.dataset, fps=30.0)),
        replace(made, lam=replace(made.lam, fingerprint="another")),
        replace(made, camera_key="observation.images.wrist"),
        replace(made, frame_stride=2),
        replace(made, token_kind="continuous"),
        replace(made, dtype="bfloat16"),
        replace(made, decoder="torchcodec"),
        replace(made, device="cuda"),
        replace(made, storage_dtype="uint16"),
    ]
    names = {cache_name(provenance) for provenance in [made, *others]}
    assert len(names) == len(others) + 1
    assert cache_name(made).startswith("top-vq-stride1-")
    assert "/" not in cache_name(replace(made, camera_key="../../x"))


def test_names_and_statistics_do_not_count_where_the_frames_are_known(store):
    made = store.provenance
    dataset = replace(made.dataset, repo_id="another/name", revision="main", digest="other statistics")
    same = replace(made, dataset=dataset, lam=replace(made.lam, path="elsewhere"), versions={})
    assert made.dataset.frames
    assert cache_name(same) == cache_name(made)
    unknown = replace(made, dataset=replace(made.dataset, frames=""))
    other = replace(unknown, dataset=replace(unknown.dataset, digest="other statistics"))
    assert cache_name(unknown) != cache_name(other)


def test_it_is_built_once_and_opened_often(cache, dataset, lam_folder, store, tmp_path):
    told = tmp_path / "told"
    first = building.open_cached(cache, dataset.root, lam_folder, told)
    again = building.open_cached(cache, dataset.root, lam_folder, told)
    assert first.path == again.path == cache / building.NAME
    assert (first.path / TENSORS_FILE).read_bytes() == (store.path / TENSORS_FILE).read_bytes()
    assert [line.split()[1] for line in told.read_text().splitlines()] == [
        "builds",
        "built",
        "opened",
        "opened",
    ]
    assert sorted(os.listdir(cache)) == [".locks", building.NAME]


def test_a_cache_that_cannot_be_locked_is_read(cache, dataset, store):
    entry = put(cache, store)
    entry._lock_file.mkdir(parents=True)  # as a folder that may only be read, also for root
    assert len(entry.open(dataset.meta, pytest.fail).values) == 60
    other = CacheEntry(cache, "other")
    other._lock_file.mkdir()
    with pytest.raises(ExtractionError, match=r"is not writable .*HF_LEROBOT_HOME.*lerobot-lam-precompute"):
        other.open(dataset.meta, pytest.fail)


def test_a_damaged_store_names_the_folder_to_remove(cache, dataset, store):
    entry = put(cache, store)
    file = entry.folder / TENSORS_FILE
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ExtractionError, match=rf"damaged.*remove {entry.folder}, and it is built again"):
        entry.open(dataset.meta, pytest.fail)


def test_a_build_that_fails_frees_the_lock(cache, dataset, lam_folder):
    def fail(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        building.entry_in(cache).open(dataset.meta, fail)
    assert not building.entry_in(cache).is_held()
    assert len(building.open_cached(cache, dataset.root, lam_folder).values) == 60


def test_what_was_not_used_for_long_is_removed(cache, dataset, store):
    old, new = put(cache, store, "old"), put(cache, store, "new")
    for entry in (old, new):
        entry.open(dataset.meta, pytest.fail)
    mapped = new.open(dataset.meta, pytest.fail)
    unused(old, days=10)
    month, week = (time.time() - days * 86400 for days in (30, 7))
    assert [entry.remove(older_than=month) for entry in (old, new)] == [None, None]
    assert old.remove(older_than=week) > 0
    assert new.remove(older_than=week) is None
    assert [entry.name for entry in cached_entries(cache)] == ["new"]
    assert new.remove() > 0
    assert not cached_entries(cache)
    assert int(mapped.values.sum()) == int(store.values.sum())  # its pages live on


@pytest.mark.slow
def test_of_several_processes_one_builds(server, cache, dataset, lam_folder, store, tmp_path):
    told = tmp_path / "told"
    processes = [
        server.Process(target=building.open_cached, args=(cache, dataset.root, lam_folder, told, 4.0))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    lines = told.read_text().splitlines()
    assert sum(line.endswith(" builds") for line in lines) == 1
    assert sum("opened 60" in line for line in lines) == 4
    assert sum("Waiting for another process" in line for line in lines) == 3
    assert (cache / building.NAME / TENSORS_FILE).read_bytes() == (store.path / TENSORS_FILE).read_bytes()


@pytest.mark.slow
def test_a_builder_that_is_killed_leaves_its_work_to_the_next(server, cache, dataset, lam_folder, tmp_path):
    entry, safe = building.entry_in(cache), 0
    for kill_at in (3, 22, 10):
        args = (kill_at, cache, dataset.root, lam_folder, tmp_path / "killed")
        process = server.Process(target=building.die_at_write, args=args)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not entry.is_held()
        if unfinished_folder(entry.folder).exists():
            assert entry.shards()[0] >= safe
            safe = entry.shards()[0]
            assert entry.provenance().camera_key == TOP
    assert 0 < safe < 5
    told = tmp_path / "told"
    assert len(building.open_cached(cache, dataset.root, lam_folder, told).values) == 60
    built = int(told.read_text().splitlines()[1].split()[-1])
    assert 0 < built < PAIRS
    assert sorted(os.listdir(cache)) == [".locks", building.NAME]


@pytest.mark.slow
def test_what_is_being_built_is_not_removed(server, cache, store):
    entry = put(cache, store)
    unfinished_folder(cache / "interrupted").mkdir()
    holding, let_go = server.Event(), server.Event()
    process = server.Process(target=building.hold, args=(cache, holding, let_go))
    process.start()
    try:
        assert holding.wait(60)
        assert entry.is_held()
        assert [entry.remove() for entry in cached_entries(cache)] == [0, None]
        assert [entry.name for entry in cached_entries(cache)] == [building.NAME]
    finally:
        let_go.set()
        process.join(60)
    assert not entry.is_held()
    assert entry.remove() > 0


def test_a_cache_without_locks_is_used_all_the_same(cache, store, dataset, without_locks, caplog):
    entry = CacheEntry(cache, building.NAME)
    opened = entry.open(dataset.meta, lambda folder: shutil.copytree(store.path, folder))
    assert opened.num_tokens == PAIRS
    assert "cannot be locked" in caplog.text
    assert not entry.is_held()
    assert entry.remove()
    assert not entry.folder.exists()
