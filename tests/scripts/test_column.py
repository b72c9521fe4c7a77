"""`lerobot-lam-tokens add-column`, and `verify` of a dataset."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.dataset_tools import delete_episodes
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion import OBS_LAM_TOKENS
from lerobot_lam_diffusion.scripts.tokens import main
from tests.conftest import write_lam
from tests.refusals import refusal


@pytest.fixture(scope="module")
def source(dataset):
    return ["--dataset.repo_id=local/squares", f"--dataset.root={dataset.root}"]


@pytest.fixture(scope="module")
def column_root(store, source, tmp_path_factory):
    root = tmp_path_factory.mktemp("column") / "data"
    main(["add-column", str(store.path), *source, f"--output_dir={root}"])
    return root


def test_add_column_tells_how_to_go_on(store, source, tmp_path, capsys):
    root = tmp_path / "data"
    column = ["--column=observation.lam", "--new_repo_id=user/with"]
    main(["add-column", str(store.path), *source, "--output-dir", str(root), *column])
    told = capsys.readouterr().out
    assert f"{root}: 60 frames with observation.lam; 1 video files linked, 0 copied" in told
    assert {"--policy.lam_tokens_key=observation.lam", "--dataset.repo_id=user/with"} < set(told.split())
    assert "--copy_videos=true" in told
    main(["verify", str(root), "--column=observation.lam"])


def test_verify_of_a_dataset(column_root, lam_folder, capsys):
    main(["verify", str(column_root), f"--lam.path={lam_folder}", "--device=cpu", "--num_samples=20"])
    told = capsys.readouterr().out
    assert "ok  60 rows of observation.lam_tokens, all valid; zeros exactly where the stride of 1" in told
    assert "there is no token (5), the others are rows of the LAM's codebook" in told
    assert "ok  its rows are as they were extracted" in told
    assert "ok  20 of 20 sampled tokens agree with the LAM" in told
    main(["verify", "--dataset.repo_id=local/x", f"--dataset.root={column_root}"])
    assert "ok  its rows are as they were extracted" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["store", pytest.param("continuous_store", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_verify_of_a_derived_dataset(kind, source, lam_folder, tmp_path, capsys, request):
    """Its video was encoded again: tokens of its frames are nearly those that the column has."""
    root = tmp_path / "data"
    main(["add-column", str(request.getfixturevalue(kind).path), *source, f"--output_dir={root}"])
    added = LeRobotDataset("local/column", root=root, video_backend="pyav")
    delete_episodes(added, [0, 3], output_dir=tmp_path / "edited", repo_id="local/edited")
    main(["verify", str(tmp_path / "edited"), f"--lam.path={lam_folder}", "--device=cpu"])
    told = capsys.readouterr().out
    assert "note  derived: meta/lam_tokens.json says nothing about it" in told
    assert "35 sampled tokens agree with the LAM" in told

    path = next((tmp_path / "edited" / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    place, column = table.column_names.index(OBS_LAM_TOKENS), table[OBS_LAM_TOKENS]
    rows = []  # each episode's tokens in another order; the first row stays, it is the missing one
    for start, length in ((0, 9), (9, 17), (26, 12)):
        rows += [start, *range(start + 5, start + length), *range(start + 1, start + 5)]
    pq.write_table(table.set_column(place, OBS_LAM_TOKENS, column.take(rows)), path)
    told = refusal(main, ["verify", tmp_path / "edited", f"--lam.path={lam_folder}", "--device=cpu"])
    assert "the rows are not those of their frames" in told


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (
            lambda rows: 1 + 1e-6 * torch.arange(len(rows))[:, None],
            "of more kinds than the codebook's 16 rows",
        ),
        (lambda rows: 1.001, "kinds of vectors are not in the LAM's codebook"),
    ],
)
def test_verify_finds_rows_of_no_codebook(column_root, lam_folder, tmp_path, factor, message):
    copy = shutil.copytree(column_root, tmp_path / "copy")
    path = next((copy / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    place = table.column_names.index(OBS_LAM_TOKENS)
    tokens = table[OBS_LAM_TOKENS].combine_chunks()
    rows = torch.tensor(tokens.to_pylist())
    changed = (rows * factor(rows)).float().reshape(-1).numpy()
    changed = pa.FixedSizeListArray.from_arrays(changed, 64)
    pq.write_table(table.set_column(place, OBS_LAM_TOKENS, changed), path)
    assert message in refusal(main, ["verify", copy, f"--lam.path={lam_folder}", "--device=cpu"])


def test_what_is_refused(column_root, store, source, dataset, frames, tmp_path):
    assert "has no column 'observation.x', only" in refusal(
        main, ["verify", column_root, "--column=observation.x"]
    )
    assert "found neither" in refusal(main, ["verify"])
    assert "a dataset, and --dataset.repo_id" in refusal(main, ["verify", column_root, *source])
    other = write_lam(tmp_path / "other", frames, seed=4)
    told = refusal(main, ["verify", column_root, f"--lam.path={other}", "--device=cpu"])
    assert "was made by the LAM" in told
    told = refusal(
        main, ["add-column", store.path, *source, "--episodes", 1, f"--output_dir={tmp_path / 'x'}"]
    )
    assert "--dataset.episodes is not for add-column" in told
    told = refusal(main, ["verify", column_root, "--column=action"])
    assert "does not say what its tokens are" in told
