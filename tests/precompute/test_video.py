"""A file read once from front to back gives the frames that LeRobot's random access gives."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.datasets.video_utils import decode_video_frames_pyav

from lerobot_lam_diffusion.precompute import frames as frames_module
from lerobot_lam_diffusion.precompute.frames import DecodeError, EpisodeFrames
from lerobot_lam_diffusion.precompute.video import SequentialVideo
from tests.conftest import TOP, record_dataset

NUM_FRAMES = 90
RATES = {
    "30": Fraction(30), "29.97": Fraction(30000, 1001), "23.976": Fraction(24000, 1001),
    "12.5": Fraction(25, 2), "7": Fraction(7),
}  # fmt: skip


def write_video(path, fps: Fraction, gop: int = 2, codec: str = "libx264", b_frames: int = 0):
    """`NUM_FRAMES` frames that all differ."""
    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        for _ in range(NUM_FRAMES):
            coarse = generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(coarse.repeat(8, 0).repeat(8, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module", params=RATES)
def rate(request):
    return RATES[request.param]


def timestamps_of(fps: Fraction) -> list[float]:
    """As a dataset's column holds them: float32 of frame / fps."""
    return [float(np.float32(frame / float(fps))) for frame in range(NUM_FRAMES)]


@pytest.mark.slow
@pytest.mark.parametrize(("gop", "b_frames"), [(2, 0), (30, 0), (30, 3), (250, 2)])
def test_all_frames_at_any_rate_and_keyframe_distance(tmp_path, rate, gop, b_frames):
    path = write_video(tmp_path / "x.mp4", rate, gop, b_frames=b_frames)
    timestamps = timestamps_of(rate)
    video = SequentialVideo(path)
    sequential = torch.cat([video.frames(timestamps[i : i + 7], 1e-4) for i in range(0, NUM_FRAMES, 7)])
    random = torch.cat([decode_video_frames_pyav(path, [t], 1e-4, return_uint8=True) for t in timestamps])
    assert torch.equal(sequential, random)
    assert len({frame.numpy().tobytes() for frame in sequential}) == NUM_FRAMES


@pytest.fixture(scope="module")
def video_30(tmp_path_factory):
    path = write_video(tmp_path_factory.mktemp("video") / "x.mp4", Fraction(30), gop=30, b_frames=2)
    return path, decode_video_frames_pyav(path, timestamps_of(Fraction(30)), 1e-4, return_uint8=True)


@given(st.lists(st.integers(0, NUM_FRAMES - 1), min_size=1, max_size=12))
@settings(max_examples=40)
def test_any_order_of_requests(video_30, order):
    """Forward, back, again, far ahead: a seek where it is needed, the right frame always."""
    path, frames = video_30
    timestamps = timestamps_of(Fraction(30))
    video = SequentialVideo(path)
    for index in order:
        assert torch.equal(video.frames([timestamps[index]], 1e-4)[0], frames[index]), (order, index)
    video.close()


def test_a_frame_too_far_from_its_timestamp_is_refused(video_30):
    path, _ = video_30
    for timestamp in (0.016, 3.5, -1.0):
        with pytest.raises(ValueError, match=r"no frame within 0\.0001 s of"):
            SequentialVideo(path).frames([timestamp], 1e-4)


def test_episodes_that_share_files_and_files_that_hold_many(tmp_path):
    """Ten episodes in several video files, read in one go, in part, and backwards."""
    lengths = (5, 3, 8, 1, 4, 6, 2, 7, 5, 9)
    recorded = record_dataset(tmp_path / "data", lengths, file_size_mb=0.012)
    files = [recorded.meta.get_video_file_path(episode, TOP) for episode in range(len(lengths))]
    assert 1 < len(set(files)) < len(lengths)
    frames = torch.stack([recorded[i][TOP] for i in range(sum(lengths))])
    ends = np.cumsum(lengths)
    for order in (range(10), [7, 2, 9], range(9, -1, -1)):
        reader = EpisodeFrames(recorded, TOP)
        for episode in order:
            expected = frames[ends[episode] - lengths[episode] : ends[episode]]
            assert torch.equal(torch.cat(list(reader.chunks(episode))), expected), episode


def test_a_large_picture_is_read_in_smaller_chunks(dataset, monkeypatch):
    monkeypatch.setattr(frames_module, "CHUNK_BYTES", 5 * 3 * 48 * 48)
    assert {len(chunk) for chunk in EpisodeFrames(dataset, TOP).chunks(0)} == {5, 4}


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "gone"])
def test_an_episode_that_cannot_be_read_is_named(tmp_path, damage):
    recorded = record_dataset(tmp_path / "data", (6, 5))
    path = tmp_path / "data" / recorded.meta.get_video_file_path(0, TOP)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else bytes(len(content)))
    reader = EpisodeFrames(recorded, TOP)
    with pytest.raises(DecodeError) as error:
        list(itertools.chain.from_iterable(reader.chunks(episode) for episode in range(2)))
    told = str(error.value)
    assert "of episode" in told
    assert str(path) in told
    assert told.endswith("Fetch or repair the file")  # no flag: not every command has it
