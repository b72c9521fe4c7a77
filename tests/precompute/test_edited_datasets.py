"""Whatever is done to a dataset, a store of it is refused or right: random edits, checked frame by frame."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.dataset_tools import delete_episodes
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import TOP, record_dataset
from tests.parquet import change_column, data_file, episodes_file

LENGTHS = (6, 5, 6, 4)
RENAMED = "observation.images.renamed"


def opened(root: Path) -> LeRobotDataset:
    return LeRobotDataset("local/squares", root=root, video_backend="pyav", return_uint8=True)


def swapped(values: list, rng: random.Random) -> list:
    a, b = rng.sample(range(len(values)), 2)
    values[a], values[b] = values[b], values[a]
    return values


def remove_episodes(root: Path, rng: random.Random) -> None:
    gone = rng.sample(range(len(LENGTHS)), rng.randint(1, 2))
    edited = delete_episodes(opened(root), gone, output_dir=root.with_name("edited"), repo_id="local/squares")
    shutil.rmtree(root)
    edited.root.rename(root)


def exchange_episodes(root: Path, rng: random.Random) -> None:
    """Two episodes show one another's pictures."""
    if list((root / "videos").rglob("*.mp4")):
        change_column(episodes_file(root), f"videos/{TOP}/from_timestamp", lambda v: swapped(v, rng))
    else:
        change_column(data_file(root), TOP, lambda v: swapped(v, rng))


def shift_offset(root: Path, rng: random.Random) -> None:
    if not list((root / "videos").rglob("*.mp4")):
        return change_column(data_file(root), TOP, lambda pictures: pictures[1:] + pictures[:1])

    def edit(offsets: list) -> list:
        at = rng.randrange(len(offsets) - 1)
        offsets[at] += rng.choice([0.1, 0.2])
        return offsets

    change_column(episodes_file(root), f"videos/{TOP}/from_timestamp", edit)


def shift_timestamps(root: Path, rng: random.Random) -> None:
    """The first episode is shown from a later frame on, and its last frame is held."""
    end = LENGTHS[0]
    change_column(data_file(root), "timestamp", lambda v: [*v[1:end], v[end - 1], *v[end:]])


def encode_again(root: Path, rng: random.Random) -> None:
    """By hand: nothing about it enters the metadata."""
    for video in (root / "videos").rglob("*.mp4"):
        with av.open(str(video)) as source:
            pictures = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
        with av.open(str(video), "w") as target:
            stream = target.add_stream("libx264", rate=10, options={"crf": "38", "g": "2"})
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            for picture in pictures:
                target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            target.mux(stream.encode())


def other_pixels(root: Path, rng: random.Random) -> None:
    """Other pictures of the same lengths, states and statistics."""
    use_videos = bool(list((root / "videos").rglob("*.mp4")))
    other = record_dataset(
        root.with_name("other"), lengths=LENGTHS, seed=rng.randint(1, 9), use_videos=use_videos
    )
    if use_videos:
        shutil.rmtree(root / "videos")
        shutil.copytree(other.root / "videos", root / "videos")
    else:
        pictures = pq.read_table(data_file(other.root))[TOP].to_pylist()
        change_column(data_file(root), TOP, lambda old: pictures[: len(old)])
    shutil.rmtree(other.root)


def drop_statistics(root: Path, rng: random.Random) -> None:
    file = episodes_file(root)
    table = pq.read_table(file)
    pq.write_table(table.drop_columns([n for n in table.column_names if n.startswith("stats/")]), file)
    (root / "meta" / "stats.json").unlink(missing_ok=True)


def add_column(root: Path, rng: random.Random) -> None:
    file = data_file(root)
    table = pq.read_table(file)
    if "extra" in table.column_names:
        return
    pq.write_table(table.append_column("extra", pa.array(np.arange(len(table), dtype=np.float32))), file)
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"]["extra"] = {"dtype": "float32", "shape": [1], "names": None}
    (root / "meta" / "info.json").write_text(json.dumps(info))


def renumber_files(root: Path, rng: random.Random) -> None:
    for video in (root / "videos").rglob("file-000.mp4"):
        video.rename(video.with_name("file-007.mp4"))
        change_column(episodes_file(root), f"videos/{TOP}/file_index", lambda v: [7] * len(v))


def rename_camera(root: Path, rng: random.Random) -> None:
    """Another camera bears the name of the LAM's, whose own pictures are now called otherwise."""
    if list((root / "videos").rglob("*.mp4")) and not (root / "videos" / RENAMED).exists():
        (root / "videos" / TOP).rename(root / "videos" / RENAMED)
        file = episodes_file(root)
        table = pq.read_table(file)
        pq.write_table(table.rename_columns([n.replace(TOP, RENAMED) for n in table.column_names]), file)
        for name in ("info.json", "stats.json"):
            document = root / "meta" / name
            if document.exists():
                document.write_text(document.read_text().replace(TOP, RENAMED))


HARMLESS = (drop_statistics, add_column, renumber_files)
HARMFUL = (
    remove_episodes, exchange_episodes, shift_offset, shift_timestamps, encode_again, other_pixels,
    rename_camera,
)  # fmt: skip


def oracle(dataset: LeRobotDataset, lam, camera: str) -> torch.Tensor:
    """token(i) = LAM(frame i - 1, frame i) within an episode, by LeRobot's own random access."""
    items = [dataset[i] for i in range(len(dataset))]
    frames = [item[camera] for item in items]
    frames = [f if f.dtype == torch.uint8 else (f * 255).round().to(torch.uint8) for f in frames]
    tokens = torch.zeros(len(items), lam.num_learned_tokens * lam.action_latent_dim)
    for i in range(1, len(items)):
        if items[i]["episode_index"] == items[i - 1]["episode_index"]:
            tokens[i] = lam.encode_pairs(frames[i - 1][None], frames[i][None]).quantized[0]
    return tokens


@pytest.fixture(scope="module", params=[True, False], ids=["video", "images"])
def base(request, tmp_path_factory, lam, lam_folder):
    root = tmp_path_factory.mktemp("base") / "data"
    dataset = record_dataset(root, lengths=LENGTHS, use_videos=request.param)
    store = precompute_tokens(
        dataset, lam, root.with_name("store"), camera_key=TOP, lam_path=str(lam_folder), batch_size=8,
        show_progress=False,
    ).store  # fmt: skip
    return dataset, store


def outcome(store: TokenStore, dataset: LeRobotDataset, lam, folder: Path) -> str:
    """What comes of the store, and of extending it, on an edited dataset; fails if a token is wrong."""
    camera = TOP if TOP in dataset.meta.camera_keys else RENAMED
    try:
        expected = oracle(dataset, lam, camera)
    except Exception:  # LeRobot itself cannot read what the edits left
        expected = None
    try:
        TokenStore.open(store.path, dataset.meta)
    except UserError:
        accepted = False
    else:
        accepted = True
        assert expected is not None
        assert torch.equal(store.window(torch.arange(len(expected)), [0])[:, 0], expected)
    try:
        extended = precompute_tokens(
            dataset, lam, folder, camera_key=camera, lam_path="lam", batch_size=8, show_progress=False,
            extend=[store] if camera == TOP else [],
        )  # fmt: skip
    except UserError:
        return "accepted" if accepted else "refused"
    assert expected is not None
    assert extended.store is not None
    assert torch.equal(extended.store.window(torch.arange(len(expected)), [0])[:, 0], expected)
    return "accepted" if accepted else "refused, extended"


@pytest.mark.slow
def test_a_store_of_an_edited_dataset_is_refused_or_right(base, lam, tmp_path):
    dataset, store = base
    counts: Counter[str] = Counter()
    for seed in range(100, 200):
        rng = random.Random(seed)
        root = shutil.copytree(dataset.root, tmp_path / str(seed) / "data")
        edits = rng.sample([*HARMLESS, *HARMFUL], rng.randint(1, 2))
        try:
            for edit in edits:
                edit(root, rng)
            edited = opened(root)
        except Exception:  # an edit on top of another, or LeRobot refuses what they left
            continue
        came = outcome(store, edited, lam, tmp_path / str(seed) / "store")
        counts[came] += 1
        if set(edits) <= set(HARMLESS):
            assert came == "accepted", edits
        shutil.rmtree(tmp_path / str(seed))
    assert counts["accepted"] > 5
    assert counts["refused"] + counts["refused, extended"] > 50
