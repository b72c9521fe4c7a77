"""The frames that the LAM sees are those of LeRobot's random access, each once and in order."""

import shutil
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image

from lerobot_lam_diffusion.precompute import frames as frames_module
from lerobot_lam_diffusion.precompute.frames import DecodeError, EpisodeFrames, choose_camera
from lerobot_lam_diffusion.utils.errors import DatasetError, UserError
from tests.conftest import TOP, record_dataset
from tests.parquet import change_column, data_file, episodes_file

WRIST = "observation.images.wrist"
LENGTHS = (7, 4, 6)


@pytest.fixture(scope="module", params=["video", "image"])
def two_cameras(request, tmp_path_factory) -> LeRobotDataset:
    root = tmp_path_factory.mktemp(request.param) / "data"
    return record_dataset(root, LENGTHS, (TOP, WRIST), use_videos=request.param == "video")


def reopened(dataset: LeRobotDataset, **options) -> LeRobotDataset:
    return LeRobotDataset(dataset.repo_id, root=dataset.root, video_backend="pyav", **options)


def random_access(dataset: LeRobotDataset, camera_key: str, episode: int) -> torch.Tensor:
    """An episode's frames item by item, as uint8 (images come as float32, videos as asked)."""
    items = [dataset[i] for i in range(len(dataset))]
    frames = torch.stack([item[camera_key] for item in items if item["episode_index"] == episode])
    return frames if frames.dtype == torch.uint8 else (frames.double() * 255).round().to(torch.uint8)


@pytest.mark.parametrize("return_uint8", [True, False])
@pytest.mark.parametrize("camera_key", [TOP, WRIST])
def test_frames_are_those_of_random_access(two_cameras, camera_key, return_uint8):
    dataset = reopened(two_cameras, return_uint8=return_uint8)
    frames = EpisodeFrames(dataset, camera_key)
    for episode, length in enumerate(LENGTHS):
        (chunk,) = frames.chunks(episode)
        assert chunk.dtype == torch.uint8
        assert chunk.shape == (length, 3, 48, 48)
        assert torch.equal(chunk, random_access(dataset, camera_key, episode))
    assert not torch.equal(
        chunk, next(EpisodeFrames(dataset, TOP if camera_key == WRIST else WRIST).chunks(2))
    )
    assert all(not torch.equal(*pair) for pair in zip(chunk[1:], chunk[:-1], strict=True))


@pytest.mark.torchcodec
def test_frames_by_torchcodec_are_those_of_its_random_access(two_cameras):
    dataset = LeRobotDataset(
        two_cameras.repo_id, root=two_cameras.root, video_backend="torchcodec", return_uint8=True
    )
    frames = EpisodeFrames(dataset, WRIST)
    for episode in (1, 0, 2):
        (chunk,) = frames.chunks(episode)
        assert torch.equal(chunk, random_access(dataset, WRIST, episode))


@pytest.mark.parametrize("episodes", [[2, 0], [1], [0, 1, 2], [2, 1, 1]])
def test_frames_of_an_episode_subset_in_any_order(two_cameras, episodes):
    subset = reopened(two_cameras, episodes=episodes)
    frames = EpisodeFrames(subset, WRIST)
    for episode in episodes:
        (chunk,) = frames.chunks(episode)
        assert torch.equal(chunk, random_access(two_cameras, WRIST, episode))


@pytest.mark.parametrize("chunk_frames", [1, 3, 7, 64])
def test_chunks_are_an_episode_cut_in_pieces(two_cameras, monkeypatch, chunk_frames):
    monkeypatch.setattr(frames_module, "CHUNK_FRAMES", chunk_frames)
    chunks = list(EpisodeFrames(two_cameras, TOP).chunks(0))
    assert [len(chunk) for chunk in chunks[:-1]] == [chunk_frames] * ((7 - 1) // chunk_frames)
    assert torch.equal(torch.cat(chunks), random_access(two_cameras, TOP, 0))


def test_image_transforms_of_training_do_not_reach_the_lam(two_cameras):
    plain = next(EpisodeFrames(two_cameras, TOP).chunks(1))
    augmented = reopened(two_cameras, image_transforms=lambda image: image * 0, return_uint8=True)
    assert not augmented[8][TOP].any()
    assert torch.equal(next(EpisodeFrames(augmented, TOP).chunks(1)), plain)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> LeRobotDataset:
    return record_dataset(tmp_path_factory.mktemp("images") / "data", (3, 2), use_videos=False)


@pytest.fixture
def changed_images(images, tmp_path):
    """Copies a dataset of images, each of them changed: `changed_images(lambda number, image: …)`."""

    def stored(change, number, image):
        file = BytesIO()
        change(number, Image.open(BytesIO(image["bytes"]))).save(file, "PNG")
        return {**image, "bytes": file.getvalue()}

    def copy(change) -> LeRobotDataset:
        root = shutil.copytree(images.root, tmp_path / "data")
        change_column(data_file(root), TOP, lambda each: [stored(change, *one) for one in enumerate(each)])
        return LeRobotDataset(images.repo_id, root=root, video_backend="pyav")

    return copy


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGBA", 4), ("P", 1), ("I;16", 1)])
@pytest.mark.parametrize("first", [0, 4])
def test_images_that_are_not_rgb(changed_images, mode, channels, first):
    def change(number, image):
        if number < first:
            return image
        return Image.fromarray(np.zeros((48, 48), np.uint16)) if mode == "I;16" else image.convert(mode)

    frames = EpisodeFrames(changed_images(change), TOP)
    told = (
        rf"frame {int(first > 0)} of episode {int(first > 0)} of dataset .*, camera {TOP}, "
        rf"is an image of mode {mode} \({channels} channels\)"
    )
    if first == 0:
        with pytest.raises(DatasetError, match=told):
            frames.check([0, 1], skip_unreadable=True)
    else:  # not the first of its episode: told as soon as it is read, and never skipped
        frames.check([0, 1])
        with pytest.raises(DatasetError, match=told):
            list(frames.chunks(1))


def test_images_of_different_sizes(changed_images):
    dataset = changed_images(lambda number, image: image.resize((20, 20 + number)))
    with pytest.raises(DecodeError, match=r"different sizes, 20 x 20 and 20 x 21 pixels"):
        list(EpisodeFrames(dataset, TOP).chunks(0))


def test_an_episode_beyond_the_end_of_its_video_is_found_before_decoding(tmp_path):
    dataset = record_dataset(tmp_path / "data", (6, 5))
    change_column(episodes_file(dataset.root), f"videos/{TOP}/from_timestamp", [0.0, 60.0])
    frames = EpisodeFrames(reopened(dataset), TOP)
    frames.check([0])
    with pytest.raises(DecodeError, match=r"it ends at 1.100 s, and by meta/episodes .* is at 60.400 s"):
        frames.check([0, 1])
    frames.check([0, 1], skip_unreadable=True)


def meta(cameras=(TOP, WRIST), depth=()):
    shapes = {**dict.fromkeys(cameras, (48, 48, 3)), **dict.fromkeys(depth, (48, 48, 1))}
    features = {
        key: {"shape": shape, "names": ["height", "width", "channels"]} for key, shape in shapes.items()
    }
    return SimpleNamespace(
        repo_id="local/x", camera_keys=[*cameras, *depth], depth_keys=[*depth], features=features
    )


DEPTH = "observation.images.depth"


def test_camera_is_the_one_that_is_named_or_the_only_one():
    assert choose_camera(meta(), WRIST) == WRIST
    assert choose_camera(meta([TOP]), None) == TOP


REFUSED = {
    "unknown": (
        meta(),
        "observation.images.side",
        "--camera_key=observation.images.side is unknown",
    ),
    "several": (meta(), None, "--camera_key is unset"),
}


@pytest.mark.parametrize(("dataset_meta", "camera_key", "expected"), REFUSED.values(), ids=REFUSED)
def test_camera_that_cannot_be_used(dataset_meta, camera_key, expected):
    with pytest.raises(UserError) as error:
        choose_camera(dataset_meta, camera_key)
    told = str(error.value)
    assert expected in told
    assert f"dataset 'local/x' has the RGB cameras ['{TOP}', '{WRIST}']" in told
    assert "as --camera_key" in told


@pytest.mark.parametrize("camera_key", [None, TOP])
def test_dataset_without_a_camera(camera_key):
    with pytest.raises(UserError, match=r"'local/x' has no RGB camera"):
        choose_camera(meta([], [DEPTH]), camera_key)


def test_depth_camera_of_a_real_dataset(tmp_path):
    depth = {"dtype": "video", "shape": (48, 48, 1), "names": ["h", "w", "c"], "info": {"is_depth_map": True}}
    features = {TOP: {"dtype": "video", "shape": (48, 48, 3), "names": ["h", "w", "c"]}, DEPTH: depth}
    dataset = LeRobotDataset.create("local/depth", 10, features, root=tmp_path / "data", video_backend="pyav")
    assert choose_camera(dataset.meta, None) == TOP
    with pytest.raises(UserError, match="is a depth camera"):
        choose_camera(dataset.meta, DEPTH)
