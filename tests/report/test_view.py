"""An episode in Rerun, read again by Rerun's own reader."""

import sys
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.scripts.tokens import main

from ..conftest import EPISODE_LENGTHS, SMALL_LAM, TOP, record_dataset
from ..refusals import refusal

pytest.importorskip("rerun")
from rerun.experimental import RrdReader

from lerobot_lam_diffusion.report.codes import principal_directions
from lerobot_lam_diffusion.report.frames import Footage
from lerobot_lam_diffusion.report.motion import dimension_names
from lerobot_lam_diffusion.report.view import View

EPISODE = 2
LENGTH = EPISODE_LENGTHS[EPISODE]


class Recording:
    """Entity path → its rows, `(frame, seconds, value)`; and what is told of it once."""

    def __init__(self, path):
        reader = RrdReader(path)
        assert len(reader.recordings()) == 1
        self.blueprints = reader.blueprints()
        self.rows, self.static = {}, {}
        for chunk in reader.store().stream().to_chunks():
            batch, entity = chunk.to_record_batch(), chunk.entity_path.lstrip("/")
            names = [name for name in batch.schema.names if ":" in name]
            if chunk.is_static:
                told = {name: batch.column(name).to_pylist()[0] for name in names}
                self.static.setdefault(entity, {}).update(told)
                continue
            (name,) = {"EncodedImage:blob", "Image:buffer", "Scalars:scalars"} & set(names)
            seconds = batch.column("timestamp").cast("int64").to_numpy() / 1e9
            columns = batch.column("frame_index").to_pylist(), seconds, batch.column(name).to_pylist()
            self.rows.setdefault(entity, []).extend(zip(*columns, strict=True))
        for rows in self.rows.values():
            rows.sort(key=lambda row: row[0])

    def counts(self):
        return Counter({entity: len(rows) for entity, rows in self.rows.items()})

    def frames(self, entity):
        return [frame for frame, _, _ in self.rows[entity]]

    def values(self, entity):
        return np.array([value for _, _, value in self.rows[entity]])

    def pixels(self, entity, frame):
        (blob,) = next(value for at, _, value in self.rows[entity] if at == frame)
        if entity == TOP:
            return np.asarray(Image.open(BytesIO(bytes(blob))))
        side = SMALL_LAM.resolution
        return np.array(blob, dtype=np.uint8).reshape(side, side, 3)


@pytest.fixture
def flags(dataset):
    return [
        f"--dataset.repo_id={dataset.repo_id}",
        f"--dataset.root={dataset.root}",
        "--dataset.video_backend=pyav",
        "--device=cpu",
    ]


@pytest.fixture
def shown(flags, tmp_path):
    """Runs the command and reads what it wrote."""

    def show(store, *more):
        path = tmp_path / "new" / "out.rrd"
        main(["view", str(store.path), *flags, f"--episode={EPISODE}", f"--save={path}", *more])
        assert [each.name for each in path.parent.iterdir()] == ["out.rrd"]
        return Recording(path)

    return show


def test_every_entity_has_a_row_for_each_frame(shown, store, dataset, frames, lam_folder, capsys):
    found = shown(store, f"--lam.path={lam_folder}")
    assert "Open it: rerun " in capsys.readouterr().out
    assert found.counts() == {
        TOP: LENGTH, "state": LENGTH, "action": LENGTH, "lam/missing": LENGTH,
        "lam/code": LENGTH - 1, "lam/norm": LENGTH - 1, "lam/prediction": LENGTH - 1,
    }  # fmt: skip
    for entity, rows in found.rows.items():
        begin = LENGTH - len(rows)
        assert found.frames(entity) == list(range(begin, LENGTH))
        assert np.allclose(
            [seconds for _, seconds, _ in rows], np.arange(begin, LENGTH) / dataset.fps, atol=1e-6
        )
    assert len(found.blueprints) == 1

    start = int(store.episode_from[EPISODE])
    own = torch.arange(start + 1, start + LENGTH)
    tokens = store.window(own, [0])[:, 0]
    assert np.array_equal(found.values("lam/code"), store.values[own].numpy())
    assert np.allclose(found.values("lam/norm")[:, 0], tokens.norm(dim=1).numpy(), rtol=1e-5)
    assert found.values("lam/missing")[:, 0].tolist() == [1] + [0] * (LENGTH - 1)
    for entity, key in (("state", "observation.state"), ("action", "action")):
        expected = torch.stack([dataset[start + row][key] for row in range(LENGTH)])
        assert np.array_equal(found.values(entity), expected.double().numpy())
        assert found.static[entity]["SeriesLines:names"] == ["x", "y"]
    assert found.static["lam/code"]["SeriesPoints:names"] == ["slot 0", "slot 1"]

    for row in (0, 5, LENGTH - 1):
        pixels = frames[start + row].permute(1, 2, 0).numpy()
        assert np.abs(found.pixels(TOP, row).astype(int) - pixels).mean() < 8  # it is a JPEG


def test_predictions_are_those_of_the_frame_a_stride_before(make_store, shown, dataset, frames, lam_folder):
    strided = make_store(dataset, frame_stride=3)
    found = shown(strided, f"--lam.path={lam_folder}")
    assert found.frames("lam/prediction") == list(range(3, LENGTH))
    assert found.values("lam/missing")[:, 0].sum() == 3
    start = int(strided.episode_from[EPISODE])
    at = torch.arange(start + 3, start + LENGTH)
    expected = load_lam(lam_folder, fdm=True).predict_next(frames[at - 3], strided.window(at, [0])[:, 0])
    for row in range(3, LENGTH):
        pixels = expected[row - 3].permute(1, 2, 0).numpy()
        assert np.abs(found.pixels("lam/prediction", row).astype(int) - pixels).max() <= 1


def test_frames_of_many_chunks_are_paired_alike(store, dataset, lam_folder, tmp_path, monkeypatch):
    whole = View(store, Footage(dataset, TOP, load_lam(lam_folder, fdm=True)), EPISODE)
    whole.save(tmp_path / "whole.rrd")
    monkeypatch.setattr("lerobot_lam_diffusion.precompute.frames.CHUNK_FRAMES", 4)
    monkeypatch.setattr("lerobot_lam_diffusion.report.view._LAM_BATCH", 3)
    whole.save(tmp_path / "chunks.rrd")
    one, other = Recording(tmp_path / "whole.rrd"), Recording(tmp_path / "chunks.rrd")
    assert one.counts() == other.counts()
    for row in range(1, LENGTH):
        pixels, others = (each.pixels("lam/prediction", row).astype(int) for each in (one, other))
        assert np.abs(pixels - others).max() <= 1
    assert [value for *_, value in one.rows[TOP]] == [value for *_, value in other.rows[TOP]]


def test_continuous_tokens_have_places_along_the_stores_directions(shown, continuous_store):
    found = shown(continuous_store)
    assert found.counts() == {
        TOP: LENGTH, "state": LENGTH, "action": LENGTH, "lam/missing": LENGTH,
        "lam/direction": LENGTH - 1, "lam/norm": LENGTH - 1,
    }  # fmt: skip
    everything = continuous_store.window(continuous_store.frames_with_tokens(), [0])[:, 0].double()
    mean, basis, shares = principal_directions(everything)
    assert shares == sorted(shares, reverse=True)
    places = (everything - mean) @ basis.T
    assert np.allclose(np.cov(places.numpy().T), np.diag(places.var(0).numpy()), atol=1e-6)
    before = sum(EPISODE_LENGTHS[:EPISODE]) - EPISODE
    assert np.allclose(found.values("lam/direction"), places[before : before + LENGTH - 1].numpy(), atol=1e-6)
    names = found.static["lam/direction"]["SeriesLines:names"]
    assert [name.split(" (")[0] for name in names] == ["direction 1", "direction 2", "direction 3"]


def test_a_dataset_of_images_and_an_episode_without_tokens(make_store, tmp_path):
    images = record_dataset(tmp_path / "data", lengths=(6, 2), use_videos=False)
    store = make_store(images, frame_stride=3)
    short = Footage(LeRobotDataset(images.repo_id, images.root, episodes=[1]), TOP)
    View(store, short, 1).save(tmp_path / "out.rrd")
    counts = Recording(tmp_path / "out.rrd").counts()
    assert counts == {TOP: 2, "state": 2, "action": 2, "lam/missing": 2}


def test_names_of_dimensions():
    def named(names, size=2):
        return dimension_names({"names": names, "shape": (size,)}, "state")

    assert named(["x", "y"]) == ["x", "y"]
    assert named({"motors": ["a", "b"]}) == ["a", "b"]
    assert named({"a": 0, "b": 1}) == ["a", "b"]
    assert named(None) == named(["only"]) == ["state[0]", "state[1]"]


@pytest.mark.parametrize(
    ("episode", "message"),
    [(-1, "--episode=-1 must not be negative"), (5, "'local/squares' has the episodes 0 to 4, not [5]")],
)
def test_an_unknown_episode_is_refused(episode, message, store, flags, tmp_path):
    told = refusal(
        main, ["view", store.path, *flags, f"--episode={episode}", f"--save={tmp_path / 'out.rrd'}"]
    )
    assert message in told
    assert not (tmp_path / "out.rrd").exists()


def test_an_episode_that_the_store_lacks_is_refused(make_store, dataset, flags, tmp_path):
    some = LeRobotDataset(
        dataset.repo_id, dataset.root, episodes=[0, 3], return_uint8=True, video_backend="pyav"
    )
    partial = make_store(some)
    told = refusal(main, ["view", partial.path, *flags, "--episode=2", f"--save={tmp_path / 'out.rrd'}"])
    assert "has no tokens of episode 2: it covers 2 of 5 episodes" in told
    main(["view", str(partial.path), *flags, "--episode=3", f"--save={tmp_path / 'out.rrd'}"])
    assert Recording(tmp_path / "out.rrd").counts()["lam/code"] == EPISODE_LENGTHS[3] - 1


@pytest.mark.parametrize(("name", "told"), [("out.rrd", "exists already"), ("out.html", "must end in .rrd")])
def test_a_bad_place_is_refused_before_anything_is_opened(name, told, tmp_path):
    (tmp_path / name).write_text("precious")
    absent = ["view", tmp_path / "none", "--dataset.repo_id=no/where", "--episode=0"]
    assert told in refusal(main, [*absent, f"--save={tmp_path / name}"])
    assert (tmp_path / name).read_text() == "precious"


def test_without_rerun_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rerun", None)
    monkeypatch.delitem(sys.modules, "lerobot_lam_diffusion.report.view")
    argv = ["view", "none", "--dataset.repo_id=no/where", "--episode=0", f"--save={tmp_path / 'out.rrd'}"]
    assert "pip install 'lerobot[viz]'" in refusal(main, argv)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a display")
def test_without_a_display_it_says_so(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    argv = ["view", "none", "--dataset.repo_id=no/where", "--episode=0"]
    assert "no display for Rerun's viewer; write a file with --save" in refusal(main, argv)


def test_a_viewer_that_does_not_start_is_one_message(monkeypatch, store, flags):
    monkeypatch.setenv("DISPLAY", ":99")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    told = refusal(main, ["view", store.path, *flags, "--episode=0"])
    assert "Rerun's viewer cannot be reached; write a file with --save" in told


def test_other_episodes_have_no_place(store, flags):
    argv = ["view", store.path, *flags, "--episode=0", "--dataset.episodes=[1]"]
    assert "--dataset.episodes is not for view" in refusal(main, argv)


def test_a_lam_that_did_not_make_the_store_is_refused(store, flags, tmp_path):
    argv = ["view", store.path, *flags, "--episode=0", f"--save={tmp_path / 'out.rrd'}"]
    assert "fingerprint" in refusal(main, [*argv, "--lam.path=pusht-compact"])


def test_what_fails_midway_leaves_no_file(store, dataset, lam, tmp_path):
    broken = View(store, Footage(dataset, TOP, lam), EPISODE)  # opened without its FDM
    with pytest.raises(ValueError, match="FDM"):
        broken.save(tmp_path / "out.rrd")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused(store, dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        View(store, Footage(dataset, TOP), EPISODE).save(tmp_path / "file" / "out.rrd")
