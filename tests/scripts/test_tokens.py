"""`lerobot-lam-tokens info` and `verify`, in this process and once as the installed command."""

import subprocess
import sys
from pathlib import Path

import pytest

from lerobot_lam_diffusion.scripts.tokens import main
from tests.conftest import record_dataset, write_lam


@pytest.fixture
def flags(dataset, lam_folder):
    return [
        f"--dataset.repo_id={dataset.repo_id}",
        f"--dataset.root={dataset.root}",
        "--dataset.video_backend=pyav",
        f"--lam.path={lam_folder}",
        "--device=cpu",
    ]


def refusal(argv):
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    assert str(stopped.value.code).startswith("error: ")
    return str(stopped.value.code)


def test_info_tells_what_a_store_holds(store, capsys):
    main(["info", str(store.path)])
    told = capsys.readouterr().out
    for fact in (
        "60 frames, 5 of them without a token",
        "all 5 episodes",
        "observation.images.top",
        "1 frames = 0.1 s",
    ):
        assert fact in told
    assert "vq, 2 x 32 numbers, encoded in float32" in told
    assert "of 16 codes a slot" in told


@pytest.mark.parametrize("kind", ["store", "continuous_store"])
def test_verify_checks_bytes_dataset_and_lam(kind, flags, capsys, request):
    store = request.getfixturevalue(kind)
    main(["verify", str(store.path), *flags, "--num_samples=20"])
    told = capsys.readouterr().out
    assert told.count("ok  ") == 3
    assert "20 of 20 sampled tokens agree" in told


def test_verify_refuses_another_lam(store, flags, frames, tmp_path):
    other = write_lam(tmp_path / "other", frames, seed=4)
    told = refusal(["verify", store.path, *flags[:-2], f"--lam.path={other}", "--device=cpu"])
    assert "was made by the LAM" in told
    assert "pass the LAM that made it as --lam.path" in told


def test_verify_finds_tokens_of_other_pixels(flags, dataset, make_store, tmp_path, monkeypatch):
    """A store whose provenance was forged to claim this dataset."""
    from lerobot_lam_diffusion.tokens.binding import dataset_digest

    other = record_dataset(tmp_path / "other", seed=2)
    store = make_store(other)
    json = store.path / "lam_tokens.json"
    here, there = (dataset_digest(d.meta, "observation.images.top") for d in (dataset, other))
    json.write_text(json.read_text().replace(there, here))
    told = refusal(["verify", store.path, *flags])
    assert "sampled tokens agree with the LAM" in told
    assert "Extract the tokens again" in told


def test_a_lam_without_a_dataset_is_refused(store, lam_folder):
    assert "needs --dataset.repo_id" in refusal(["verify", store.path, f"--lam.path={lam_folder}"])


def test_a_missing_store_is_one_line(tmp_path):
    assert "no token store at" in refusal(["info", tmp_path / "nothing"])


def test_an_unknown_command_names_the_known_ones(capsys):
    assert "info, verify" in refusal(["frobnicate"])
    assert "lerobot-lam-tokens verify" in capsys.readouterr().out


@pytest.mark.slow
def test_the_installed_command(store):
    command = Path(sys.executable).parent / "lerobot-lam-tokens"
    done = subprocess.run([command, "info", store.path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "60 frames" in done.stdout
