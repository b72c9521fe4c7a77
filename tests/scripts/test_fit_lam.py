"""`lerobot-lam-fit` on a real (small) LeRobot dataset with video, in this process."""

import os
import shutil

import pytest

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.scripts.fit_lam import CHECKPOINT_FILE, FRAMES_FILE, main
from tests.conftest import record_dataset, with_rows_beyond
from tests.parquet import change_column


@pytest.fixture
def arguments(dataset, tmp_path):
    """Flags of a tiny fit; keyword arguments add or replace some."""

    def make(**changes):
        flags = {
            "dataset.repo_id": dataset.repo_id, "dataset.root": dataset.root, "output_dir": tmp_path / "lam",
            "dataset.video_backend": "pyav", "preset": "tiny", "steps": 10, "batch_size": 8,
            "holdout_episodes": 2, "device": "cpu",
        }  # fmt: skip
        flags |= {name.replace("__", "."): value for name, value in changes.items()}
        return [f"--{name}={value}" for name, value in flags.items()]

    return make


def with_still_state(dataset, root):
    shutil.copytree(dataset.root, root)
    for path in root.glob("data/**/*.parquet"):
        change_column(path, "observation.state", lambda states: [[0.0] * len(state) for state in states])
    return root


def complaint(argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    return str(stopped.value.code)


def test_fits_and_says_how_good_it_is(arguments, tmp_path, frames, capsys):
    main(arguments())
    folder = tmp_path / "lam"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.safetensors", "model_config.json"]
    lam = load_lam(folder, fdm=True)
    assert lam.encode_pairs(frames[:4], frames[1:5]).indices.shape == (4, 2)
    card, printed = (folder / "README.md").read_text(), capsys.readouterr().out
    for figure in (
        "copy of the last frame",
        "moving pixels",
        "perplexity",
        "probe: R²",
        "shuffled",
    ):
        assert figure in card
        assert figure in printed
    for fact in (
        "2 episodes",
        "`observation.images.top`",
        "1 (0.1 s at 10 fps)",
        "10 of 8 pairs",
        lam.fingerprint,
    ):
        assert fact in card
    assert "lerobot-lam-precompute" in printed
    assert "is not empty" in complaint(arguments()), "a LAM is never overwritten"


@pytest.mark.parametrize(
    ("case", "tied_to", "probe"),
    [
        ("as recorded", "changes of `observation.state`, with weight 0.5", "R² of the state's change"),
        ("state_weight=0", "the optical flow of the pixels, with weight 1", "R² of the state's change"),
        ("the state stands still", "the optical flow of the pixels, with weight 1", "R² of the optical flow"),
    ],
)
def test_says_what_the_tokens_are_tied_to(arguments, dataset, tmp_path, capsys, case, tied_to, probe):
    changes = {"state_weight": 0 if case == "state_weight=0" else 0.5}
    if case == "the state stands still":
        changes["dataset__root"] = with_still_state(dataset, tmp_path / "data")
    main(arguments(steps=2, **changes))
    assert f"The LAM's tokens are tied to {tied_to}.\n" in capsys.readouterr().out
    card = (tmp_path / "lam" / "README.md").read_text()
    assert f"| tokens tied to | {tied_to} |" in card
    assert f"| probe: {probe} |" in card


def test_fits_where_folders_cannot_be_synced(arguments, tmp_path, without_folder_sync):
    main(arguments(steps=2))
    assert load_lam(tmp_path / "lam")


def test_a_damaged_video_is_told_before_any_work_and_with_flags_that_fit_has(arguments, dataset, tmp_path):
    root = shutil.copytree(dataset.root, tmp_path / "data")
    video = next(root.rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:300])
    told = complaint(arguments(dataset__root=root))
    assert str(video) in told
    assert "--on_error" not in told
    assert not (tmp_path / "lam").exists()


@pytest.mark.slow
def test_resume_equals_uninterrupted(arguments, tmp_path, monkeypatch):
    main(arguments(save_every=4))

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lerobot_lam_diffusion.scripts.fit_lam.save_lam", interrupt)
    broken = tmp_path / "broken"
    assert complaint(arguments(output_dir=broken, save_every=4)) == "130"
    assert {CHECKPOINT_FILE, FRAMES_FILE} <= {p.name for p in broken.iterdir()}
    monkeypatch.undo()
    main(arguments(output_dir=broken, save_every=4, resume="true"))
    whole = (tmp_path / "lam" / "model.safetensors").read_bytes()
    assert (broken / "model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_a_fit_stopped_before_its_first_checkpoint_is_simply_run_again(arguments, tmp_path, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lerobot_lam_diffusion.scripts.fit_lam.Fit", interrupt)
    assert complaint(arguments()) == "130"
    assert os.listdir(tmp_path / "lam") == [FRAMES_FILE]
    monkeypatch.undo()
    main(arguments(steps=2))
    assert (tmp_path / "lam" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_fit_is_not_resumed_on_other_frames(arguments, tmp_path, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lerobot_lam_diffusion.scripts.fit_lam.save_lam", interrupt)
    assert complaint(arguments(save_every=4)) == "130"
    other = record_dataset(tmp_path / "other", seed=1)  # of the same lengths
    told = complaint(arguments(save_every=4, resume="true", dataset__root=other.root))
    assert "belongs to another LAM, other settings or data" in told


def test_rows_beyond_the_last_episode_are_no_frames(arguments, dataset, tmp_path):
    """An interrupted recording leaves them."""
    main(arguments(dataset__root=with_rows_beyond(dataset, tmp_path / "data"), steps=2))
    assert (tmp_path / "lam" / "model.safetensors").is_file()


def test_bad_flags_are_told_at_once(arguments):
    message = complaint(
        arguments(preset="huge", steps=0, frame_stride=0, learning_rate=0, holdout_episodes=0)
    )
    for part in ("--preset=huge is unknown, choose one of compact", "--steps=0", "--frame_stride=0",
                 "--learning_rate=0", "--holdout_episodes=0"):  # fmt: skip
        assert part in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera_key": "observation.images.nose"}, r"observation\.images\.top"),
        ({"holdout_episodes": 5}, "5 of 5 episodes would be held out"),
        ({"frame_stride": 40}, "no pair of frames 40 apart"),
        ({"resume": "true"}, "start without --resume"),
        ({"dataset__root": "/nonexistent/data"}, "cannot be read in /nonexistent/data/meta"),
    ],
)
def test_bad_input_stops_before_any_work(arguments, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments(**changes))
    assert not (tmp_path / "lam").exists()
