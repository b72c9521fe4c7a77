"""Whatever is written has the permissions that the user's umask asks for, neither more nor fewer."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

from lerobot_lam_diffusion.demo.record import record_pusht
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.precompute.processes import Process
from lerobot_lam_diffusion.scripts.fit_lam import main as fit
from lerobot_lam_diffusion.tokens import checked
from lerobot_lam_diffusion.tokens.add_column import add_column
from lerobot_lam_diffusion.tokens.export import FORMATS, export_store
from lerobot_lam_diffusion.tokens.layout import unfinished_folder
from lerobot_lam_diffusion.tokens.pairs import PairCache
from lerobot_lam_diffusion.tokens.pull import pull_store
from tests.conftest import TOP


@pytest.fixture(params=[0o077, 0o002, 0o022], ids=oct)
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Name → mode of what has other permissions than what is new; files linked from elsewhere aside."""
    wrong = {}
    for path in (folder, *folder.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        status = path.stat()
        if stat.S_IMODE(status.st_mode) != expected and (path.is_dir() or status.st_nlink == 1):
            wrong[str(path.relative_to(folder))] = oct(status.st_mode)
    return wrong


@pytest.mark.slow
def test_stores_and_what_is_made_of_them(umask, dataset, store, lam, lam_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(checked, "HF_LEROBOT_HOME", out / "home")
    options = {"camera_key": TOP, "lam_path": str(lam_folder), "show_progress": False, "shard_frames": 1}
    precompute_tokens(dataset, lam, out / "store", **options)
    precompute_tokens(dataset, lam, out / "part", process=Process(num_shards=2), **options)
    add_column(store, dataset.meta, out / "column")
    add_column(store, dataset.meta, out / "copied", copy_videos=True)
    PairCache.make(out / "pairs", store.provenance, store.codebook, store.episode_from, store.episode_to)
    for format in FORMATS:
        export_store(store, out / f"tokens.{format}", format)
    assert unfinished_folder(out / "part").is_dir()
    assert list((out / "home").rglob("checked/*"))
    assert wrong_modes(out, umask) == {}


def test_a_store_of_the_hub(umask, hub, random_files, tmp_path):
    hub.add("user/tokens", random_files)
    pull_store("user/tokens", tmp_path / "out" / "pulled")
    assert wrong_modes(tmp_path / "out", umask) == {}


def test_a_column_of_a_dataset_that_may_only_be_read(umask, dataset, store, tmp_path):
    """As a copy that an administrator shares; a copied mode would also stop the user from writing on."""
    shared = Path(shutil.copytree(dataset.root, tmp_path / "shared"))
    files = [path for path in shared.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o444)
    folders = [shared, *(path for path in shared.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        add_column(store, LeRobotDatasetMetadata("local/squares", shared), tmp_path / "column")
    finally:
        for path in folders:
            path.chmod(0o755)  # or pytest could not remove them
    assert wrong_modes(tmp_path / "column", umask) == {}


@pytest.mark.slow
def test_a_lam_that_is_fitted(umask, dataset, tmp_path):
    flags = {
        "dataset.repo_id": dataset.repo_id, "dataset.root": dataset.root, "output_dir": tmp_path / "lam",
        "dataset.video_backend": "pyav", "preset": "tiny", "steps": 2, "batch_size": 8,
        "holdout_episodes": 2, "device": "cpu",
    }  # fmt: skip
    fit([f"--{name}={value}" for name, value in flags.items()])
    assert wrong_modes(tmp_path / "lam", umask) == {}


@pytest.mark.slow
def test_a_recorded_dataset(umask, tmp_path):
    pytest.importorskip("gym_pusht")
    record_pusht(tmp_path / "pusht", "local/pusht", 1, near_goal=True)
    assert wrong_modes(tmp_path / "pusht", umask) == {}
