"""Whatever stops an extraction, nothing finished is lost and nothing half-written is taken for finished."""

import os
import resource
import signal
import socket

import pytest

from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE, unfinished_folder
from tests.conftest import EPISODE_LENGTHS, TOP
from tests.precompute import interrupted

pytestmark = pytest.mark.slow

PAIRS = sum(EPISODE_LENGTHS) - len(EPISODE_LENGTHS)


@pytest.fixture(scope="module")
def server():
    return interrupted.server()


@pytest.fixture(scope="module")
def where(dataset, lam_folder):
    return dataset.root, lam_folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, where):
    """The store of a run that nothing happened to."""
    summary = interrupted.extract(*where, tmp_path_factory.mktemp("undisturbed") / "store")
    assert summary.encoded == PAIRS
    assert len(summary.store.values.unique()) >= 8
    return summary.store


@pytest.fixture(scope="module")
def num_writes(tmp_path_factory, server, where):
    results = server.SimpleQueue()
    folder = tmp_path_factory.mktemp("counted") / "store"
    process = server.Process(target=interrupted.count_writes, args=(results, *where, folder, {}))
    process.start()
    count = results.get()
    process.join()
    assert count > 30
    return count


def same_bytes(a: TokenStore, b: TokenStore, names=(TENSORS_FILE, PROVENANCE_FILE)) -> bool:
    return all((a.path / name).read_bytes() == (b.path / name).read_bytes() for name in names)


def finished_shards(output_dir) -> list[int]:
    """Finished shards; shard e holds episode e. A whole store holds all of them."""
    if (output_dir / PROVENANCE_FILE).exists():
        return list(range(len(EPISODE_LENGTHS)))
    return [int(path.stem) for path in unfinished_folder(output_dir).glob("0*.safetensors")]


def pairs_of(shards: list[int]) -> int:
    return sum(EPISODE_LENGTHS[shard] - 1 for shard in shards)


def resumed_is_the_same(where, output_dir, undisturbed, names=(TENSORS_FILE, PROVENANCE_FILE)) -> int:
    """Run again; shards that had not to be encoded again."""
    safe = finished_shards(output_dir)
    summary = interrupted.extract(*where, output_dir)
    assert summary.encoded == PAIRS - pairs_of(safe)
    assert same_bytes(summary.store, undisturbed, names)
    assert os.listdir(output_dir.parent) == ["store"]
    return len(safe)


def test_killed_at_every_write_a_run_goes_on_where_it_was(server, where, undisturbed, num_writes, tmp_path):
    safe = []
    for kill_at in range(1, num_writes + 1):
        output_dir = tmp_path / str(kill_at) / "store"
        process = server.Process(target=interrupted.die_at_write, args=(kill_at, *where, output_dir, {}))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, kill_at
        safe.append(resumed_is_the_same(where, output_dir, undisturbed))
    # The later it died, the more was safe. Which shard comes first is up to the threads.
    assert safe == sorted(safe)
    assert len(set(safe)) == len(EPISODE_LENGTHS) + 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_command_says_how_to_go_on(server, where, undisturbed, tmp_path, number):
    root, lam = where
    argv = [
        "--dataset.repo_id=local/squares", f"--dataset.root={root}", "--dataset.video_backend=pyav",
        f"--lam.path={lam}", f"--camera_key={TOP}", f"--output_dir={tmp_path / 'out' / 'store'}",
        "--device=cpu", "--batch_size=8", "--shard_frames=1", "--num_workers=1",
    ]  # fmt: skip
    told = tmp_path / "told.txt"
    process = server.Process(target=interrupted.command_stopped_by, args=(number, 20, argv, told))
    process.start()
    process.join(60)
    assert process.exitcode == 130
    text = told.read_text()
    assert "of 5 shards are safe in" in text
    assert "run the same command again to go on" in text
    assert "Traceback" not in text
    resumed_is_the_same(where, tmp_path / "out" / "store", undisturbed, [TENSORS_FILE])  # another lam.path


def test_a_file_that_may_not_grow_loses_nothing(where, tmp_path):
    """As a quota does; continuous tokens, whose shards are 2 to 4 KB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3500, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            interrupted.extract(*where, tmp_path / "store", use_vq_tokens=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = os.listdir(unfinished_folder(tmp_path / "store"))
    assert "00000.safetensors" not in left
    assert not [name for name in left if "partial" in name]
    assert interrupted.extract(*where, tmp_path / "store", use_vq_tokens=False).store.num_tokens == PAIRS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(server, world_size, where, output_dir, dies: dict[int, int] | None = None) -> list[int]:
    """Exit codes of `world_size` processes; a launcher ends the others when one dies."""
    port = free_port()
    processes = [
        server.Process(
            target=interrupted.run_as,
            args=(rank, world_size, (dies or {}).get(rank, 0), *where, output_dir, port),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_make_the_same_store(server, where, undisturbed, tmp_path, world_size):
    assert launch(server, world_size, where, tmp_path / "store") == [0] * world_size
    assert same_bytes(TokenStore.open(tmp_path / "store"), undisturbed)
    assert os.listdir(tmp_path) == ["store"]


def test_one_of_three_processes_dies_and_the_next_launch_goes_on(server, where, undisturbed, tmp_path):
    output_dir = tmp_path / "store"
    codes = launch(server, 3, where, output_dir, dies={1: 3})
    assert codes[1] == -signal.SIGKILL
    assert 0 < len(finished_shards(output_dir)) < len(EPISODE_LENGTHS)
    assert launch(server, 2, where, output_dir) == [0, 0]
    assert same_bytes(TokenStore.open(output_dir), undisturbed)
