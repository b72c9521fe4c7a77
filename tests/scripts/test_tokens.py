"""`lerobot-lam-tokens`, in this process."""

import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.scripts.tokens import main
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.checked import note, place_of
from lerobot_lam_diffusion.tokens.layout import stamp_of
from lerobot_lam_diffusion.tokens.writer import write_store
from tests.conftest import record_dataset, write_lam
from tests.refusals import refusal


@pytest.fixture
def flags(dataset, lam_folder):
    return [
        f"--dataset.repo_id={dataset.repo_id}",
        f"--dataset.root={dataset.root}",
        "--dataset.video_backend=pyav",
        f"--lam.path={lam_folder}",
        "--device=cpu",
    ]


def test_info_tells_what_a_store_holds(store, capsys):
    main(["info", str(store.path)])
    told = capsys.readouterr().out
    for fact in (
        "all 5 episodes; 5 of 60 frames have no token",
        "observation.images.top",
        "1 frame = 0.1 s",
        "vq, 2 × 32 numbers (codebook of 16)",
        "float32 on cpu",
        "uint8, largest error 0\n",
    ):
        assert fact in told
    assert "skipped" not in told
    assert "of 16 codes a slot" in told


@pytest.mark.parametrize("kind", ["store", "continuous_store"])
def test_verify_checks_bytes_dataset_and_lam(kind, flags, capsys, request):
    store = request.getfixturevalue(kind)
    main(["verify", str(store.path), *flags, "--num_samples=20"])
    told = capsys.readouterr().out
    assert told.count("ok  ") == 3
    assert "20 of 20 sampled tokens agree" in told


@pytest.fixture
def small_store(continuous_store, tmp_path):
    """The continuous store, its tokens kept as bfloat16: much coarser than the LAM's own rounding."""

    def make(storage):
        provenance = replace(continuous_store.provenance, storage_dtype=storage)
        start, stop = continuous_store.episode_from, continuous_store.episode_to
        blocks, covered = [continuous_store.values], torch.ones(len(start), dtype=torch.bool)
        return write_store(tmp_path / storage, provenance, blocks, torch.empty(0), start, stop, covered)

    return make


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
def test_info_and_verify_know_what_storage_costs(storage, small_store, flags, capsys):
    store = small_store(storage)
    main(["info", str(store.path)])
    assert f"{storage}, largest error {store.provenance.max_error:.2g}" in capsys.readouterr().out
    main(["verify", str(store.path), *flags, "--num_samples=20"])
    assert "20 of 20 sampled tokens agree" in capsys.readouterr().out


def test_info_names_skipped_episodes(store, tmp_path, capsys):
    start, stop = store.episode_from, store.episode_to
    covered = torch.tensor([True, False, True, True, True])
    provenance = replace(store.provenance, skipped={"1": "video/1.mp4 is cut"})
    rows = torch.cat([store.values[:14], store.values[23:]])
    path = write_store(tmp_path / "store", provenance, [rows], store.codebook, start, stop, covered).path
    main(["info", str(path)])
    assert "episode 1       skipped: video/1.mp4 is cut\n" in capsys.readouterr().out


def test_verify_reads_a_store_again_that_was_found_whole(store, tmp_path):
    """A store that carries the stamp of a check is believed at open: `verify` believes nothing."""
    path = shutil.copytree(store.path, tmp_path / "copy") / "lam_tokens.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    note(place_of("checked", path.parent), stamp_of(path.parent), True)
    TokenStore.open(path)
    assert "its SHA-256 is" in refusal(main, ["verify", path.parent])


def test_verify_of_some_episodes_samples_only_those(store, flags, capsys):
    main(["verify", str(store.path), *flags, "--dataset.episodes=[1,3]", "--num_samples=100"])
    assert "15 of 15 sampled tokens agree" in capsys.readouterr().out  # all that these two have


@pytest.mark.parametrize("name", ["*_lam", "runs #2", "@x", "on", "[0"])
def test_any_name_is_a_name(name, tmp_path, monkeypatch):
    """draccus reads values as YAML."""
    monkeypatch.chdir(tmp_path)
    for command in ("info", "verify"):
        assert f"no token store at {name}" in refusal(main, [command, name])


@pytest.mark.parametrize("kind", ["store", "continuous_store"])
def test_an_exported_pt_file_is_verified_with_its_dataset(kind, flags, tmp_path, capsys, request):
    store, path = request.getfixturevalue(kind), tmp_path / "lam_tokens.pt"
    main(["export", str(store.path), "--format=pt", f"--output={path}"])
    assert f"{path}: " in capsys.readouterr().out
    main(["verify", str(path), *flags, "--num_samples=20"])
    told = capsys.readouterr().out
    assert "a row for each frame of the dataset" in told
    assert "20 of 20 sampled tokens agree" in told
    assert "open it together with its dataset" in refusal(main, ["verify", path])
    assert "--camera_key=top is unknown" in refusal(main, ["verify", path, *flags, "--camera-key", "top"])


def test_verify_refuses_a_pt_file_of_another_lam(store, flags, frames, tmp_path, capsys):
    path = tmp_path / "lam_tokens.pt"
    main(["export", str(store.path), "--format=pt", f"--output={path}"])
    other = write_lam(tmp_path / "other", frames, seed=4)
    told = refusal(main, ["verify", path, *flags[:-2], f"--lam.path={other}", "--device=cpu"])
    assert "sampled tokens agree with the LAM" in told
    narrow = write_lam(tmp_path / "narrow", frames, action_latent_dim=16)
    told = refusal(main, ["verify", path, *flags[:-2], f"--lam.path={narrow}", "--device=cpu"])
    assert "has tokens of 64 numbers, this LAM makes 32" in told


def test_merge_puts_partial_stores_together(store, dataset, make_store, tmp_path, capsys):
    parts = [
        make_store(
            LeRobotDataset(dataset.repo_id, root=dataset.root, episodes=episodes, video_backend="pyav")
        )
        for episodes in ([0, 4], [1, 2, 3])
    ]
    main(["merge", *[str(part.path) for part in parts], f"--output_dir={tmp_path / 'whole'}"])
    assert "60 frames; it covers all 5 episodes" in capsys.readouterr().out
    assert torch.equal(TokenStore.open(tmp_path / "whole").values, store.values)
    told = refusal(main, ["merge", parts[0].path, "--output_dir", tmp_path / "whole"])
    assert "exists already and is not empty" in told
    assert "nothing to merge" in refusal(main, ["merge", f"--output_dir={tmp_path / 'x'}"])


def test_export_refuses_in_one_line(store, tmp_path, capsys):
    argv = ["export", store.path, f"--output={tmp_path / 'x'}"]
    assert "--format=csv is unknown; expected one of pt, parquet, npy" in refusal(
        main, [*argv, "--format=csv"]
    )
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(store.path), str(store.path)])
    assert stopped.value.code == 2
    assert "expected one STORE, found" in capsys.readouterr().err


def test_verify_refuses_another_lam(store, flags, frames, tmp_path):
    other = write_lam(tmp_path / "other", frames, seed=4)
    told = refusal(main, ["verify", store.path, *flags[:-2], f"--lam.path={other}", "--device=cpu"])
    assert "was made by the LAM" in told
    assert "pass the LAM that made it as --lam.path" in told


def test_verify_finds_tokens_of_other_pixels(flags, store, make_store, tmp_path):
    """A store whose provenance was forged to claim this dataset."""
    forged = make_store(record_dataset(tmp_path / "other", seed=2))
    document = json.loads((forged.path / "lam_tokens.json").read_text())
    document["dataset"] = json.loads((store.path / "lam_tokens.json").read_text())["dataset"]
    (forged.path / "lam_tokens.json").write_text(json.dumps(document))
    told = refusal(main, ["verify", forged.path, *flags])
    assert "sampled tokens agree with the LAM" in told
    assert "Extract the tokens again" in told


def test_a_lam_without_a_dataset_is_refused(store, lam_folder):
    assert "needs --dataset.repo_id" in refusal(main, ["verify", store.path, f"--lam.path={lam_folder}"])


def test_a_missing_store_is_one_line(tmp_path):
    assert "no token store at" in refusal(main, ["info", tmp_path / "nothing"])


@pytest.mark.parametrize(
    ("words", "told"),
    [(["infos"], "infos; did you mean info?"), (["frobnicate"], "frobnicate."), (["cache"], "cache; did")],
)
def test_an_unknown_command_names_the_known_ones(words, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: unknown command {told}")
    assert " Commands: info, verify, report, view" in printed.err


@pytest.fixture
def late(dataset, store, tmp_path):
    """A copy of the dataset whose frames lie 20 ms after their timestamps in the video."""
    root = shutil.copytree(dataset.root, tmp_path / "late")
    (path,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(path)
    at = table.column_names.index("timestamp")
    shifted = pc.subtract(table["timestamp"], pa.scalar(0.02, pa.float32()))
    pq.write_table(table.set_column(at, table.schema.field(at), shifted), path)
    return root


def on(root, lam_folder):
    return [
        "--dataset.repo_id=local/squares", f"--dataset.root={root}", "--dataset.video_backend=pyav",
        f"--lam.path={lam_folder}", "--device=cpu",
    ]  # fmt: skip


@pytest.mark.slow
def test_verify_allows_for_late_frames_as_extraction_does(late, make_store, lam_folder, capsys):
    store = make_store(LeRobotDataset("local/squares", root=late, tolerance_s=0.05, video_backend="pyav"))
    told = refusal(main, ["verify", store.path, *on(late, lam_folder)])
    assert f"of dataset 'local/squares' at {late} cannot be read" in told
    assert "tolerance_s=0.0001" in told
    main(["verify", str(store.path), *on(late, lam_folder), "--tolerance_s=0.05"])
    assert "55 of 55 sampled tokens agree" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", 300])
def test_verify_names_a_video_that_cannot_be_read(dataset, store, lam_folder, tmp_path, content):
    root = shutil.copytree(dataset.root, tmp_path / "damaged")
    video = next(root.rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:content] if isinstance(content, int) else content)
    told = refusal(main, ["verify", store.path, *on(root, lam_folder)])
    assert video.name in told
    assert "--on_error" not in told
