"""Each command on the way to training ends by printing the next one, and that one would be accepted."""

import re

import pytest

from lerobot_lam_diffusion.scripts.next_step import next_step, train_on, training, without_network
from lerobot_lam_diffusion.scripts.tokens import main
from tests.docs.commands import commands_in, parse


def next_of(told: str) -> list[str]:
    """The command after the last heading; it is the end of what was told, but for notes on it."""
    ends = re.search(r"\n\n[A-Z][^\n]*:\n((?:  .*\n)+)(?:[A-Z].*\n)*\Z", told)
    assert ends is not None, told
    (words,) = commands_in(ends[1])
    return words


@pytest.fixture
def flags(dataset):
    return [f"--dataset.repo_id={dataset.repo_id}", f"--dataset.root={dataset.root}"]


@pytest.mark.slow
def test_verify_with_the_dataset_leads_to_training(continuous_store, flags, lam_folder, tmp_path, capsys):
    for more in ([], [f"--lam.path={lam_folder}", "--num_samples=4", "--device=cpu"]):
        main(["verify", str(continuous_store.path), *flags, *more])
        words = next_of(capsys.readouterr().out)
        assert words[0] == "lerobot-train"
        assert set(flags) < set(words)
        assert "--policy.lam_use_vq_tokens=false" in words
    assert parse(words, tmp_path).policy.lam_tokens_path == str(continuous_store.path)


@pytest.mark.slow
def test_a_column_leads_to_training_and_so_does_its_check(store, flags, tmp_path, capsys):
    root = tmp_path / "column"
    main(["add-column", str(store.path), *flags, f"--output_dir={root}"])
    after_writing = next_of(capsys.readouterr().out)
    main(["verify", str(root)])
    after_checking = next_of(capsys.readouterr().out)
    assert f"--dataset.root={root}" in after_writing
    assert f"--dataset.root={root}" in after_checking
    assert parse(after_writing, tmp_path).policy.use_precomputed_lam_tokens


def test_the_rollout_runs_at_the_datasets_rate():
    on_a_robot = training("user/data", None)
    assert " --fps=10 and the flags of your robot" in next_step(on_a_robot, fps=10.0)
    assert "--fps" not in next_step(on_a_robot)  # where it is not known


def test_trainings_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    for _ in range(3):
        told += [word for word in training("user/data", None) if word.startswith("--output_dir=")]
        (tmp_path / told[-1].partition("=")[2]).mkdir(parents=True)
    assert told == [f"--output_dir=outputs/data_lam{end}" for end in ("", "_2", "_3")]


@pytest.mark.parametrize(("offline", "kept", "expected"), [("1", 0, 1), ("1", 1, 0), ("0", 0, 0)])
def test_offline_training_needs_no_backbone_weights(offline, kept, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    if kept:
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").touch()
    assert without_network() == ["--policy.pretrained_backbone_weights=null"] * expected


def test_a_partial_store_trains_on_its_episodes(dataset, make_store, tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    some = LeRobotDataset(dataset.repo_id, root=dataset.root, episodes=[1, 3], return_uint8=True)
    command = train_on(make_store(some), "a b/store", "user/data")
    assert "--dataset.episodes=[1,3]" in command
    assert "'--policy.lam_tokens_path=a b/store'" in next_step(command)
