"""Tokens kept pair by pair: what is read is what was written of those very pixels, or nothing."""

import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lerobot_lam_diffusion.tokens import TokenStoreError
from lerobot_lam_diffusion.tokens.pairs import PAIRS_FILE, PairCache
from lerobot_lam_diffusion.utils.files import remove_whole

VALUES = {"vq": (2, torch.int32), "continuous": (64, torch.float32)}


@pytest.fixture
def make(tmp_path, store, continuous_store):
    """Makes (or opens again) a cache of the tokens of `store`, VQ or continuous."""

    def make(kind="vq", name="cache"):
        like = store if kind == "vq" else continuous_store
        provenance = replace(like.provenance, decoder="unknown")
        codebook = store.codebook if kind == "vq" else torch.empty(0)
        return PairCache.make(tmp_path / name, provenance, codebook, like.episode_from, like.episode_to)

    return make


def some(frames, kind="vq"):
    """Frames, digests and values that tell the frame."""
    frames = torch.tensor(frames)
    width, dtype = VALUES[kind]
    return frames, frames * 7919 - 3, (frames.unsqueeze(1) + torch.arange(width)).to(dtype) % 16


@pytest.mark.parametrize("kind", ["vq", "continuous"])
def test_what_was_written_is_read_by_another_process_too(make, kind):
    cache, again = make(kind), make(kind)
    frames, pixels, values = some([3, 59, 7, 20], kind)
    assert not cache.read(frames, pixels).known.any()
    cache.write(frames, pixels, values)
    found = again.read(torch.tensor([59, 4, 20]), torch.tensor([pixels[1], 0, pixels[3] + 1]))
    assert found.known.tolist() == [True, False, False]
    assert found.other_pixels.tolist() == [False, False, True]
    assert torch.equal(found.values[0], values[1])
    assert found.values[1].eq(0).all()


@given(
    writes=st.lists(st.tuples(st.integers(0, 59), st.integers(-(2**63), 2**63 - 1)), max_size=30),
    asked=st.lists(st.tuples(st.integers(0, 59), st.integers(-(2**63), 2**63 - 1)), max_size=10),
)
def test_the_last_write_of_a_pair_counts(tmp_path_factory, store, writes, asked):
    cache = PairCache.make(
        tmp_path_factory.mktemp("pairs") / "cache",
        store.provenance,
        store.codebook,
        store.episode_from,
        store.episode_to,
    )
    expected = {}
    for number, (frame, pixels) in enumerate(writes):
        value = torch.tensor([[number % 16, frame % 16]], dtype=torch.int32)
        cache.write(torch.tensor([frame]), torch.tensor([pixels]), value)
        expected[frame] = pixels, value[0]
    assert sum(len(frames) for frames, _, _ in cache.scan()) == len(expected)
    asked = [*asked, *writes]
    found = cache.read(
        torch.tensor([frame for frame, _ in asked], dtype=torch.int64),
        torch.tensor([pixels for _, pixels in asked], dtype=torch.int64),
    )
    for row, (frame, pixels) in enumerate(asked):
        known = frame in expected and expected[frame][0] == pixels
        assert bool(found.known[row]) == known
        assert bool(found.other_pixels[row]) == (frame in expected and not known)
        assert not known or torch.equal(found.values[row], expected[frame][1])


def test_half_a_record_and_a_flipped_bit_are_nothing(make):
    cache = make()
    frames, pixels, values = some([5])
    cache.write(frames, pixels, values)
    path = cache.path / PAIRS_FILE
    whole = path.read_bytes()
    size = len(whole) // 60
    for cut in range(1, size):
        path.write_bytes(whole[: 5 * size + cut].ljust(len(whole), b"\0"))
        assert not cache.read(frames, pixels).known.any()
        assert [damaged for _, _, damaged in cache.scan()] == [1]
    for bit in range(8 * size):
        content = bytearray(whole)
        content[5 * size + bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert not cache.read(frames, pixels).known.any()
    moved = bytes(size) * 6 + whole[5 * size : 6 * size] + bytes(size) * 53
    path.write_bytes(moved)
    assert not cache.read(frames + 1, pixels).known.any()


def test_copies_have_files_of_their_own(make):
    """Of a policy that is averaged (EMA), pickled or sent to another process."""
    cache = make()
    frames, pixels, values = some([5, 9])
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        copied.write(frames, pixels, values)
        del copied
        gc.collect()
        assert cache.read(frames, pixels).known.all()
    cache.write(frames, pixels, values)


def test_frames_of_another_dataset_are_passed_over(make):
    cache = make()
    frames, pixels, values = some([59, 60, 1000])
    cache.write(frames, pixels, values)
    assert cache.read(frames, pixels).known.tolist() == [True, False, False]
    assert len(list(PairCache.open(cache.path).scan())) == 1


def test_a_shortened_file_is_refused(make):
    cache = make()
    os.truncate(cache.path / PAIRS_FILE, 100)
    assert not cache.read(*some([59])[:2]).known.any()
    with pytest.raises(TokenStoreError, match=r"pairs.bin has 100 bytes, expected .* Remove the folder"):
        PairCache.open(cache.path)


def test_a_code_past_the_codebook_is_no_token(make):
    cache = make()
    frames, pixels = torch.tensor([3]), torch.tensor([0])
    cache.write(frames, pixels, torch.tensor([[16, 0]], dtype=torch.int32))
    with pytest.raises(IndexError, match="out of bounds"):
        cache.decode(cache.read(frames, pixels).values)


def test_a_training_goes_on_when_its_cache_is_removed(make):
    cache = make()
    cache.write(*some([5]))
    remove_whole(cache.path)
    cache.write(*some([7]))
    assert cache.read(*some([5, 7])[:2]).known.all()
    with pytest.raises(TokenStoreError, match="no cache of live tokens at"):
        pickle.loads(pickle.dumps(cache))


def test_tokens_that_are_not_finite_are_not_kept(make):
    cache = make("continuous")
    frames, pixels, values = some([5], "continuous")
    with pytest.raises(ValueError, match="NaN or Inf"):
        cache.write(frames, pixels, values * float("nan"))
    assert not cache.read(frames, pixels).known.any()


def _write_all(path, seed):
    cache = PairCache.open(path)
    frames, pixels, values = some(list(range(60)))
    for at in torch.randperm(60, generator=torch.manual_seed(seed)).split(3):
        cache.write(frames[at], pixels[at], values[at])


def test_processes_share_it(make):
    cache = make()
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_all, args=(cache.path, seed)) for seed in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    frames, pixels, values = some(list(range(60)))
    found = cache.read(frames, pixels)
    assert found.known.all()
    assert torch.equal(found.values, values)


def test_a_full_disk_raises_and_leaves_what_was_there(store, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", place], capture_output=True
    ).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        cache = PairCache.make(
            place / "cache", store.provenance, store.codebook, store.episode_from, store.episode_to
        )
        (place / "filler").write_bytes(bytes(os.statvfs(place).f_bavail * os.statvfs(place).f_frsize))
        with pytest.raises(OSError, match="No space left"):
            cache.write(*some([5]))
        (place / "filler").unlink()
        cache.write(*some([5]))
        assert cache.read(*some([5])[:2]).known.all()
        del cache
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
