"""`lerobot-lam-demo`: its flags, where it works, what it refuses, and record-only."""

import importlib.util
import os

import huggingface_hub.constants
import pytest
from lerobot.datasets import LeRobotDataset

from lerobot_lam_diffusion.scripts import demo
from lerobot_lam_diffusion.scripts.demo import DemoConfig, main
from lerobot_lam_diffusion.utils.errors import UserError


def needs_simulator() -> None:
    pytest.importorskip("gym_pusht")


def test_record_only_records_a_dataset_and_says_so(tmp_path, capfd):
    needs_simulator()
    root = tmp_path / "data" / "mine"
    main(["--record-only", "--root", str(root), "--num-episodes=1", "--repo_id=local/mine", "--first_seed=4"])
    dataset = LeRobotDataset("local/mine", root=root, video_backend="pyav")
    assert dataset.meta.total_episodes == 1
    console = capfd.readouterr()
    assert f"1 episodes, {len(dataset)} frames: {root}" in console.out.splitlines()
    assert "lerobot-lam-precompute --dataset.repo_id=local/mine" in console.out  # what to do with it
    assert "Svt" not in console.out + console.err


@pytest.mark.parametrize("flags", [["--record_only=true", "--root={}"], ["--output_dir={}"]])
def test_a_folder_with_something_in_it_is_refused(flags, tmp_path):
    needs_simulator()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists already and is not empty"):
        main([*(flag.format(tmp_path) for flag in flags), "--num_episodes=2"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_flags_are_told_all_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        DemoConfig(num_episodes=1, steps=0, seed=-1, root=tmp_path)
    for text in ("num_episodes=1 must be at least 2", "steps=0", "seed=-1", "--root", "4 problems"):
        assert text in str(error.value)
    assert DemoConfig(num_episodes=1, record_only=True, root=tmp_path).num_episodes == 1


def test_a_missing_simulator_is_told_with_its_remedy(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda name: None if name == "gym_pusht" else find(name)
    )
    with pytest.raises(SystemExit, match=r"needs gym_pusht.*pip install 'lerobot\[pusht\]'"):
        main([])


def test_an_unknown_lam_is_told_before_anything_is_recorded(tmp_path):
    needs_simulator()
    with pytest.raises(SystemExit, match="There is no LAM at 'nowhere'"):
        main(["--lam.path=nowhere", f"--output_dir={tmp_path / 'new'}"])
    assert list(tmp_path.iterdir()) == []


def test_it_goes_offline_by_itself(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    demo.go_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert huggingface_hub.constants.is_offline_mode()
