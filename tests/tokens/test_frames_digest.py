"""A store belongs to the frames it was made of: not to their statistics, names or numbers of files."""

import json
import logging
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets.dataset_tools import add_features, convert_image_to_video_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.binding import dataset_digest
from lerobot_lam_diffusion.tokens.episode_hashes import are_known, codec_name, episode_hashes
from lerobot_lam_diffusion.tokens.frames_digest import frames_digest
from tests.conftest import TOP, record_dataset


def opened(root) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata("local/squares", root=root)


def edit_parquet(folder, change):
    for file in sorted(folder.rglob("*.parquet")):
        pq.write_table(change(pq.read_table(file)), file)


def replaced(table, name, values):
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, table[name].type))


def drop_image_statistics(root):
    edit_parquet(
        root / "meta/episodes",
        lambda table: table.drop_columns([c for c in table.column_names if c.startswith(f"stats/{TOP}/")]),
    )
    stats = json.loads((root / "meta/stats.json").read_text())
    stats.pop(TOP)
    (root / "meta/stats.json").write_text(json.dumps(stats))


@pytest.fixture(scope="module", params=["video", "images"])
def recorded(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param) / "data"
    return record_dataset(root, lengths=(4, 3, 4), use_videos=request.param == "video")


@pytest.fixture
def root(recorded, tmp_path):
    return shutil.copytree(recorded.root, tmp_path / "copy")


def test_images_beside_the_data_files_are_read_each_time(tmp_path):
    """No note is kept of them: what a note is believed by are the data files' sizes and times."""
    root = record_dataset(tmp_path / "data", lengths=(4, 3), use_videos=False).root

    def beside(table):
        for number, picture in enumerate(table[TOP].to_pylist()):
            (root / f"{number}.png").write_bytes(picture["bytes"])
        return replaced(table, TOP, [{"bytes": None, "path": f"{k}.png"} for k in range(len(table))])

    edit_parquet(root / "data", beside)
    digest, hashes = frames_digest(opened(root), TOP), episode_hashes(opened(root), TOP)
    assert are_known(hashes).all()
    (root / "5.png").write_bytes((root / "4.png").read_bytes())
    assert frames_digest(opened(root), TOP) != digest
    assert (episode_hashes(opened(root), TOP) != hashes).any(1).tolist() == [False, True]
    (root / "0.png").unlink()
    assert are_known(episode_hashes(opened(root), TOP)).tolist() == [False, True]


@pytest.fixture
def before(recorded):
    found = frames_digest(recorded.meta, TOP)
    assert found is not None
    return found


def test_an_episodes_hash_does_not_depend_on_the_decoder():
    assert {codec_name(av.Codec(decoder, "r")) for decoder in ("av1", "libdav1d")} == {"libdav1d"}
    assert [codec_name(av.Codec(decoder, "r")) for decoder in ("h264", "libvpx-vp9")] == ["h264", "vp9"]


def test_a_copy_is_the_same(before, root):
    assert frames_digest(opened(root), TOP) == before


def test_dropped_statistics_are_the_same_frames(before, root):
    old = dataset_digest(opened(root), TOP)
    drop_image_statistics(root)
    assert frames_digest(opened(root), TOP) == before
    assert dataset_digest(opened(root), TOP) != old


def test_another_column_is_the_same_frames(before, root, tmp_path):
    column = (np.zeros((11, 3), np.float32), {"dtype": "float32", "shape": (3,), "names": None})
    dataset = LeRobotDataset("local/squares", root=root, video_backend="pyav")
    edited = add_features(
        dataset, {"observation.extra": column}, output_dir=tmp_path / "e", repo_id="local/e"
    )
    assert frames_digest(edited.meta, TOP) == before


def test_other_pixels_without_image_statistics(before, root, recorded):
    """Nothing about the two datasets differs but their pixels."""
    if TOP in recorded.meta.video_keys:
        import av

        (file,) = (root / "videos" / TOP).rglob("*.mp4")
        other = file.with_name("other.mp4")
        with av.open(str(file)) as source, av.open(str(other), "w") as target:
            stream = target.add_stream("libx264", rate=10)
            stream.width = stream.height = 48
            for frame in source.decode(video=0):
                pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24")))
                target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            target.mux(stream.encode())
        other.replace(file)
    else:
        edit_parquet(root / "data", lambda t: replaced(t, TOP, t[TOP].to_pylist()[::-1]))
    old = dataset_digest(recorded.meta, TOP)
    assert dataset_digest(opened(root), TOP) == old
    assert frames_digest(opened(root), TOP) != before


def test_edited_timestamps(before, root):
    edit_parquet(root / "data", lambda t: replaced(t, "timestamp", [0.0] * len(t)))
    assert frames_digest(opened(root), TOP) != before


def test_missing_files_tell_nothing(root):
    shutil.rmtree(root / "data")
    assert frames_digest(opened(root), TOP) is None


def test_changed_in_place_is_found_after_it_was_noted(before, root):
    assert frames_digest(opened(root), TOP) == frames_digest(opened(root), TOP) == before
    edit_parquet(root / "data", lambda t: replaced(t, "timestamp", t["timestamp"].to_pylist()[::-1]))
    assert frames_digest(opened(root), TOP) != before


@pytest.fixture
def copied_root(dataset, tmp_path):
    return shutil.copytree(dataset.root, tmp_path / "data")


def refuse(store, root):
    with pytest.raises(TokenStoreError, match="episodes differ from those that the tokens were made of"):
        TokenStore.open(store.path, opened(root))


def test_repaired_video_offsets(store, copied_root):
    name = f"videos/{TOP}/from_timestamp"
    edit_parquet(
        copied_root / "meta/episodes",
        lambda t: replaced(t, name, [0.0, *(v - 0.1 for v in t[name].to_pylist()[1:])]),
    )
    refuse(store, copied_root)


def test_two_episodes_swapped(store, tmp_path):
    root = record_dataset(tmp_path / "equal", lengths=(5, 5), seed=3).root
    before = frames_digest(opened(root), TOP)
    name = f"videos/{TOP}/from_timestamp"
    edit_parquet(root / "meta/episodes", lambda t: replaced(t, name, t[name].to_pylist()[::-1]))
    assert frames_digest(opened(root), TOP) != before


def test_renumbered_files_are_the_same_frames(store, copied_root):
    folder = copied_root / "videos" / TOP / "chunk-000"
    (folder / "file-000.mp4").rename(folder / "file-007.mp4")
    name = f"videos/{TOP}/file_index"
    edit_parquet(copied_root / "meta/episodes", lambda t: replaced(t, name, [7] * len(t)))
    TokenStore.open(store.path, opened(copied_root))


def test_store_of_format_2_is_bound_as_before_with_one_warning(store, copied_root, tmp_path, caplog):
    old = shutil.copytree(store.path, tmp_path / "old")
    document = json.loads((old / "lam_tokens.json").read_text())
    del document["dataset"]["frames"]
    (old / "lam_tokens.json").write_text(json.dumps({**document, "format_version": 2}))
    with caplog.at_level(logging.WARNING):
        TokenStore.open(old, opened(copied_root))
        TokenStore.open(old, opened(copied_root))
    assert caplog.text.count("bound to its dataset by lengths and statistics only") == 1
    assert "lerobot-lam-tokens verify" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.cast(pa.schema([(f.name, large(f.type)) for f in t.schema])),
        lambda t: t.set_column(
            t.column_names.index("length"), "length", t["length"].cast(pa.int32()).dictionary_encode()
        ),
        lambda t: t.drop_columns([c for c in t.column_names if c.startswith(f"stats/{TOP}/")]),
        lambda t: t.select(t.column_names[::-1]),
    ],
    ids=["large lists", "dictionary of int32", "without statistics", "order"],
)
def test_episodes_files_of_several_types(store, copied_root, change):
    (file,) = (copied_root / "meta/episodes").rglob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(table[:3], file)
    pq.write_table(change(table[3:]), file.with_name("file-001.parquet"))
    meta = opened(copied_root)
    dataset_digest(meta, TOP)
    TokenStore.open(store.path, meta)


def large(kind):
    return pa.large_list(large(kind.value_type)) if pa.types.is_list(kind) else kind


def test_images_that_became_video_are_other_frames(tmp_path, make_store):
    """LeRobot's converter carries the statistics over; the video's pixels are not those of the images."""
    images = record_dataset(tmp_path / "images", lengths=(4, 3, 4), use_videos=False)
    store = make_store(images)
    video = convert_image_to_video_dataset(
        images, output_dir=tmp_path / "video", repo_id="local/video", num_workers=1
    )
    with pytest.raises(TokenStoreError, match="frames"):
        TokenStore.open(store.path, video.meta)
