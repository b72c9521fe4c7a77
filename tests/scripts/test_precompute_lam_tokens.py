"""`lerobot-lam-precompute`, from its flags to its closing lines."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from lerobot.utils.import_utils import get_safe_default_video_backend

from lerobot_lam_diffusion.precompute import engine
from lerobot_lam_diffusion.scripts import precompute_lam_tokens, tokens
from lerobot_lam_diffusion.scripts.next_step import without_network
from lerobot_lam_diffusion.scripts.precompute_lam_tokens import main
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from tests.conftest import TOP, record_dataset
from tests.refusals import refusal

YAML = """
dataset: {{repo_id: local/squares, root: {root}, video_backend: pyav}}
lam: {{path: {lam}}}
camera_key: {camera}
device: cpu
output_dir: to be overridden
"""


@pytest.fixture
def flags(dataset, lam_folder, tmp_path):
    """The flags of an extraction into `tmp_path / "store"`, as LeRobot spells them; keywords change them."""

    def make(**changes: object) -> list[str]:
        values = {
            "dataset.repo_id": "local/squares",
            "dataset.root": dataset.root,
            "dataset.video_backend": "pyav",
            "lam.path": lam_folder,
            "camera_key": TOP,
            "output_dir": tmp_path / "store",
            "device": "cpu",
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    return make


def refusal_to_begin(argv, tmp_path) -> str:
    """The one message of a command that must not begin; the workplace is as it was."""
    before = sorted(tmp_path.rglob("*"))
    message = refusal(main, argv)
    assert sorted(tmp_path.rglob("*")) == before
    return message


def same_files(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in (TENSORS_FILE, PROVENANCE_FILE))


@pytest.mark.slow
def test_all_spellings_give_the_same_store(flags, dataset, lam_folder, store, tmp_path, capsys):
    config = tmp_path / "x.yaml"
    config.write_text(YAML.format(root=dataset.root, lam=lam_folder, camera=TOP))
    dashed = [
        *("--dataset-repo-id", "local/squares", "--dataset-root", str(dataset.root)),
        *("--lam-model-path", str(lam_folder), "--camera-key", TOP, "--output-dir", str(tmp_path / "dashed")),
        *("--batch-size", "8", "--device", "cpu", "--dataset.video_backend=pyav"),
    ]
    main(flags(output_dir=tmp_path / "dotted"))
    main(dashed)
    main([f"--config_path={config}", f"--output_dir={tmp_path / 'yaml'}"])
    for name in ("dotted", "dashed", "yaml"):
        assert same_files(tmp_path / name, tmp_path / "dotted")
        assert torch.equal(TokenStore.open(tmp_path / name).values, store.values)
    assert len(store.values.unique()) >= 8
    capsys.readouterr()


def test_some_episodes_of_continuous_tokens(flags, continuous_store, tmp_path, capsys):
    main([*flags(output_dir=tmp_path / "dashed"), "--episodes", "3", "1", "--no-vq-tokens"])
    printed = capsys.readouterr().out
    main([*flags(output_dir=tmp_path / "dotted", dataset__episodes="[3,1]", use_vq_tokens="false")])
    assert same_files(tmp_path / "dashed", tmp_path / "dotted")
    opened = TokenStore.open(tmp_path / "dashed")
    assert opened.kind == "continuous"
    assert opened.missing_episodes == [0, 2, 4]
    index = torch.arange(14, 23)
    torch.testing.assert_close(
        opened.window(index, [0]), continuous_store.window(index, [0]), atol=2e-4, rtol=0
    )
    assert "17 in 2 episodes" in printed
    assert "codebook" not in printed
    assert "--policy.lam_use_vq_tokens=false" in printed
    assert "--dataset.episodes=[1,3]" in printed  # without it, training would ask for tokens of the others


def test_the_closing_lines_name_the_store_and_the_next_command(flags, tmp_path, capsys, dataset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(flags(output_dir="with space/store", frame_stride=3))
    printed = capsys.readouterr().out
    place = tmp_path / "with space" / "store"
    size = sum(path.stat().st_size for path in place.iterdir())
    perplexity = ", ".join(f"{value:.1f}" for value in TokenStore.open(place).code_perplexity())
    for line in (
        "frames    60 in 5 episodes",
        "missing   15 tokens: no pair ends in the first 3 frames of an episode",
        f"tokens    vq, 64 values a frame, camera {TOP}",
        f"codebook  perplexity {perplexity} of 16 codes a slot",
        f"size      {size:,} bytes",
        f"store     {place}",
    ):
        assert line in printed
    command = re.search(r"Train on it:\n((?:  .*\n)+)", printed)[1]
    assert shlex.split(command.replace("\\\n", "")) == [
        "lerobot-train",
        "--policy.type=diffusion_lam",
        "--dataset.repo_id=local/squares",
        f"--dataset.root={dataset.root}",
        "--policy.use_precomputed_lam_tokens=true",
        f"--policy.lam_tokens_path={place}",
        "--policy.push_to_hub=false",
        *without_network(),
        "--output_dir=outputs/squares_lam",
    ]
    assert "--dataset.episodes" not in printed
    assert "lam_use_vq_tokens" not in printed


def test_the_only_camera_need_not_be_named_and_a_folder_is_recorded_absolutely(
    flags, lam_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(lam_folder.parent)
    main(flags(camera_key=None, lam__path=lam_folder.name))
    provenance = TokenStore.open(tmp_path / "store").provenance
    assert provenance.camera_key == TOP
    assert provenance.lam.path == str(lam_folder)


def test_bfloat16_is_part_of_the_tokens_identity(flags, tmp_path):
    main(flags(dtype="bfloat16"))
    assert TokenStore.open(tmp_path / "store").provenance.dtype == "bfloat16"


def test_wrong_flags_are_all_told_at_once(flags, tmp_path):
    told = refusal_to_begin(
        flags(
            batch_size=0,
            frame_stride=0,
            dtype="int8",
            dataset__episodes="[]",
            dataset__video_backend="vlc",
        ),
        tmp_path,
    )
    assert "5 problems" in told
    for part in (
        "--batch_size=0 must be at least 1",
        "--frame_stride=0 must be at least 1",
        "--dtype=int8 must be float32 or bfloat16",
        "--dataset.episodes is empty",
        "--dataset.video_backend=vlc must be torchcodec or pyav",
    ):
        assert part in told


WRONG = {
    "no LAM": ({"lam__path": "/no/such/lam"}, "There is no LAM at '/no/such/lam'"),
    "unknown camera": ({"camera_key": "observation.images.side"}, f"has the RGB cameras ['{TOP}']"),
    "no such device": ({"device": "abacus"}, "the device abacus cannot be used here"),
    "unknown episode": (
        {"dataset__episodes": "[1,5,9]"},
        "dataset 'local/squares' has the episodes 0 to 4, not [5, 9]",
    ),
    "negative episode": ({"dataset__episodes": "[-1]"}, "none of them negative"),
}


@pytest.mark.parametrize(("changes", "expected"), WRONG.values(), ids=WRONG)
def test_bad_input_is_one_error_before_anything_is_written(flags, tmp_path, changes, expected):
    assert expected in refusal_to_begin(flags(**changes), tmp_path)


def test_no_dataset(flags, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(
            SystemExit, match=f"cannot be read in .*{name}/meta.*correct --dataset.repo_id or"
        ):
            main(flags(dataset__root=tmp_path / name))
    assert not (tmp_path / "store").exists()


def test_several_cameras_and_none_named(flags, tmp_path):
    wrist = "observation.images.wrist"
    record_dataset(tmp_path / "data", (3,), (TOP, wrist))
    told = refusal_to_begin(flags(dataset__root=tmp_path / "data", camera_key=None), tmp_path)
    assert "--camera_key is unset" in told
    assert f"['{TOP}', '{wrist}']" in told


def test_an_existing_output_is_refused_before_the_lam_is_loaded(flags, tmp_path, monkeypatch):
    def not_called(*_args, **_kwargs):
        raise AssertionError("work was begun")

    for name in ("resolve_lam", "usable_device", "open_dataset", "open_metadata"):
        monkeypatch.setattr(precompute_lam_tokens, name, not_called)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine").touch()
    assert "exists already and is not empty; choose another --output_dir" in refusal_to_begin(
        flags(), tmp_path
    )
    (tmp_path / "file").touch()
    assert "is a file" in refusal_to_begin(flags(output_dir=tmp_path / "file" / "store"), tmp_path)


def test_an_extraction_that_is_interrupted_before_it_began_leaves_nothing(flags, tmp_path, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(precompute_lam_tokens, "precompute_tokens", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(flags())
    assert stop.value.code == 130
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_the_installed_command(flags, store, tmp_path):
    command = Path(sysconfig.get_path("scripts")) / "lerobot-lam-precompute"
    run = subprocess.run([command, *flags()], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert f"store     {tmp_path / 'store'}" in run.stdout
    assert "lerobot-train --policy.type=diffusion_lam" in run.stdout
    assert "frame/s" in run.stderr
    assert torch.equal(TokenStore.open(tmp_path / "store").values, store.values)
    assert json.loads((tmp_path / "store" / PROVENANCE_FILE).read_text())["camera_key"] == TOP

    again = subprocess.run([command, *flags()], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "is finished already" not in again.stderr
    assert "all of it was there already; nothing was extracted" in again.stdout

    other = subprocess.run([command, *flags(frame_stride=2)], capture_output=True, text=True, timeout=300)
    assert other.returncode == 1
    assert "error: " in other.stderr
    assert "frame_stride is 1, expected 2" in other.stderr


@pytest.mark.slow
def test_torchrun_shares_the_work(flags, store, tmp_path):
    """Two real processes, as the docs launch them; each ends by itself, one of them with the report."""
    torchrun = Path(sysconfig.get_path("scripts")) / "torchrun"
    command = [torchrun, "--standalone", "--nproc_per_node=2", "-m", precompute_lam_tokens.__name__]
    run = subprocess.run(
        [*command, *flags(shard_frames=1)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("frames    60 in 5 episodes") >= 1
    assert torch.equal(TokenStore.open(tmp_path / "store").values, store.values)
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.slow
def test_a_job_array_and_its_last_merge_by_hand(flags, store, tmp_path, capsys):
    main(flags(shard_frames=1, shard_index=0, num_shards=2))
    told = capsys.readouterr().out
    assert "This process is done: " in told
    assert "of 5 shards are finished; the process that finishes the last one merges them" in told
    with pytest.raises(SystemExit, match=r"of 5 shards; run the extraction's command again"):
        tokens.main(["merge", str(tmp_path / "store")])
    main(flags(shard_frames=1, shard_index=1, num_shards=2))
    assert "frames    60 in 5 episodes" in capsys.readouterr().out
    assert torch.equal(TokenStore.open(tmp_path / "store").values, store.values)
    tokens.main(["merge", str(tmp_path / "store")])  # whole already
    assert "it covers all 5 episodes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there are no shards in"):
        tokens.main(["merge", str(tmp_path / "nowhere")])


def test_a_merge_by_hand_of_what_all_processes_left(flags, store, tmp_path, monkeypatch, capsys):
    """As if every process had died just before merging."""
    monkeypatch.setattr(engine, "merge_shards", lambda *_: None)
    main(flags(shard_frames=1))
    monkeypatch.undo()
    tokens.main(["merge", str(tmp_path / "store")])
    assert "it covers all 5 episodes" in capsys.readouterr().out
    assert torch.equal(TokenStore.open(tmp_path / "store").values, store.values)
    assert os.listdir(tmp_path) == ["store"]


def test_a_skipped_episode_is_told_and_left_out_of_the_next_command(flags, dataset, tmp_path, capsys):
    copy = shutil.copytree(dataset.root, tmp_path / "data")
    video = copy / dataset.meta.get_video_file_path(0, TOP)
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 4 // 5])
    told = refusal(main, flags(dataset__root=copy, shard_frames=1))
    assert "cannot be read from" in told
    assert "--on_error=skip" in told
    main(flags(dataset__root=copy, shard_frames=1, on_error="skip"))
    printed = capsys.readouterr().out
    skipped = sorted(TokenStore.open(tmp_path / "store").skipped)
    assert skipped[-1] == 4
    kept = str([episode for episode in range(5) if episode not in skipped]).replace(" ", "")
    assert f"SKIPPED   episode {skipped[0]}: frames " in printed
    assert f"--dataset.episodes={kept}" in printed


@pytest.mark.parametrize("gone", ["meta/info.json", "meta/tasks.parquet", "meta/episodes", "data", "videos"])
def test_a_file_of_a_local_dataset_that_is_missing_is_named(flags, dataset, tmp_path, gone):
    copy = shutil.copytree(dataset.root, tmp_path / "data")
    path = copy / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    told = refusal_to_begin(flags(dataset__root=copy), tmp_path)
    assert f"at {copy} is not whole: {gone}" in told
    assert "is not there" in told
    assert "Hub" not in told


def test_metadata_that_cannot_be_read(flags, dataset, tmp_path):
    copy = shutil.copytree(dataset.root, tmp_path / "data")
    info = json.loads((copy / "meta" / "info.json").read_text())
    (copy / "meta" / "info.json").write_text(json.dumps({**info, "fps": 0}))
    told = refusal_to_begin(flags(dataset__root=copy), tmp_path)
    assert f"dataset 'local/squares' cannot be read in {copy / 'meta'}, nor" in told
    assert "(fps must be" in told


def test_episodes_of_a_missing_file_are_skipped(flags, tmp_path, capsys, lam):
    recorded = record_dataset(tmp_path / "data", (5, 6, 8, 3), file_size_mb=0.008)
    videos = [recorded.meta.get_video_file_path(episode, TOP) for episode in range(4)]
    frames = torch.stack([recorded[i][TOP] for i in range(5)])
    gone = [episode for episode in range(4) if videos[episode] == videos[3]]
    (recorded.root / videos[3]).unlink()
    main(flags(dataset__root=recorded.root, on_error="skip"))
    assert f"SKIPPED   episode {gone[0]}: {videos[3]} is not there" in capsys.readouterr().out
    store = TokenStore.open(tmp_path / "store")
    assert list(store.skipped) == store.missing_episodes == gone
    expected = lam.encode_pairs(frames[:-1], frames[1:]).quantized
    assert torch.equal(store.window(torch.arange(1, 5), [0])[:, 0], expected)


def test_tasks_of_a_cluster_decode_as_the_machine_that_submits_them(flags, monkeypatch):
    submitted = {}

    def submit(_config, _function, task_flags, _output_dir):
        submitted.update(task_flags)
        return "submitted"

    monkeypatch.setattr("lerobot_lam_diffusion.precompute.cluster.submit", submit)
    main(flags(dataset__video_backend=None, cluster__engine="local", cluster__tasks=2))
    assert submitted["dataset"]["video_backend"] == get_safe_default_video_backend()
