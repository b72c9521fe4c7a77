"""Videos as they come: the right frames at the right times, or one clear error."""

import itertools
import json
import math
import tracemalloc

import av
import numpy as np
import pytest
import torch

from lerobot_lam_diffusion.precompute.demonstrations import (
    DemonstrationVideo,
    encode_video,
    videos_in,
)
from lerobot_lam_diffusion.scripts.precompute_lam_tokens import main
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.utils.errors import DatasetError
from tests.videos import turn, write_video

FPS = 10


def numbered(count: int, height: int = 32, width: int = 32) -> list[np.ndarray]:
    """Pictures that tell their number by their brightness."""
    return [np.full((height, width, 3), 8 * k, np.uint8) for k in range(count)]


def numbers(video: DemonstrationVideo, fps: float = FPS) -> list[int]:
    """Which of the numbered pictures its frames are."""
    frames = torch.cat(list(video.chunks(fps))).float()
    return (frames.mean((1, 2, 3)) / 8).round().int().tolist()


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (10, list(range(12))),
        (20, list(range(0, 12, 2))),
        (5, [math.floor(k / 2 + 0.5) for k in range(23)]),  # halfway the later one
        (30, [0, 3, 6, 9]),
        # 13 to 10: at 0, 0.1, … s the nearest of the frames at 0, 1/13, …, none of them twice
        (13, [math.floor(1.3 * k + 0.5) for k in range(9)]),
    ],
)
def test_a_constant_rate_gives_the_nearest_frames(rate, expected, tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered(12), rate)
    assert numbers(DemonstrationVideo(path)) == expected


def test_a_variable_rate_holds_a_picture_while_it_is_shown(tmp_path):
    times = [0, 0.1, 0.2, 0.8, 0.9, 1.0]
    path = write_video(tmp_path / "a.mkv", numbered(6), 30, times=times)
    # By the clock, not by counting frames: the third picture stands for six ticks.
    assert numbers(DemonstrationVideo(path)) == [0, 1, 2, 2, 2, 2, 2, 2, 3, 4, 5]


def test_rounded_times_of_a_container_move_no_frame(tmp_path):
    """Matroska counts milliseconds: at 30 fps frames lie up to half of one beside their time."""
    path = write_video(tmp_path / "a.mkv", numbered(30), 30)
    assert numbers(DemonstrationVideo(path), 30) == list(range(30))


@pytest.mark.parametrize(
    ("fragment", "expected"),
    [("#t=0.5,0.8", [5, 6, 7]), ("#t=,0.3", [0, 1, 2]), ("#t=0.9", [9, 10, 11]), ("#t=npt:1,1.1", [10])],
)
def test_a_media_fragment_is_a_part_in_seconds(fragment, expected, tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered(12), FPS)
    assert numbers(DemonstrationVideo.parse(f"{path}{fragment}")) == expected


def test_a_file_may_have_a_hash_in_its_name(tmp_path):
    path = write_video(tmp_path / "take#7.mkv", numbered(3), FPS)
    assert DemonstrationVideo.parse(str(path)).path == path


def test_a_phone_video_is_turned_upright(tmp_path):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = 250  # bright at the top left of the sensor
    path = turn(write_video(tmp_path / "phone.mp4", [picture] * 3, FPS, "libx264", "yuv420p"))
    frames = torch.cat(list(DemonstrationVideo(path).chunks(FPS)))
    assert frames.shape == (3, 3, 64, 32)
    quarters = frames[0].float().mean(0).unflatten(0, (2, 32)).unflatten(2, (2, 16)).mean((1, 3))
    assert (quarters > 125).tolist() == [[False, True], [False, False]]  # a quarter turn clockwise


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix", "audio"),
    [
        ("libx264", "yuv420p", "mp4", False),
        ("libx264", "yuv420p", "mp4", True),
        ("libx265", "yuv420p", "mp4", True),
        ("libx264", "yuv444p", "mov", True),
        ("libvpx-vp9", "yuv420p", "webm", False),
        ("mpeg4", "yuv420p", "avi", False),
    ],
)
def test_codecs_and_containers(codec, pix_fmt, suffix, audio, tmp_path):
    path = tmp_path / f"a.{suffix}"
    write_video(path, numbered(12, 48, 64), FPS, codec, pix_fmt, audio=audio)
    assert numbers(DemonstrationVideo(path)) == list(range(12))


def test_odd_sizes(tmp_path):
    path = write_video(tmp_path / "odd.mkv", numbered(4, 33, 51), FPS)
    assert torch.cat(list(DemonstrationVideo(path).chunks(FPS))).shape == (4, 3, 33, 51)


@pytest.mark.slow
def test_a_long_video_takes_no_more_memory(tmp_path):
    """Frames come a chunk at a time: 64 of them, or fewer large ones."""
    path = write_video(tmp_path / "long.mp4", numbered(30, 240, 320) * 20, 30, "libx264", "yuv420p")
    tracemalloc.start()
    sizes = [len(chunk) for chunk in DemonstrationVideo(path).chunks(30)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == 600
    assert max(sizes) == 64
    assert peak < 5 * 64 * 240 * 320 * 3


@pytest.fixture
def bad(tmp_path):
    """Name → a file that is no demonstration."""
    whole = write_video(
        tmp_path / "whole.mp4",
        list(np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), np.uint8)),
        FPS,
        "libx264",
        "yuv420p",
        options={"movflags": "faststart"},
    )
    data = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    write_video(tmp_path / "plain.mp4", numbered(30), FPS, "libx264", "yuv420p")
    (tmp_path / "headless.mp4").write_bytes((tmp_path / "plain.mp4").read_bytes()[:-600])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_video(tmp_path / "still.mkv", numbered(1), FPS)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        silence.sample_rate, silence.pts = 8000, 0
        container.mux([*stream.encode(silence), *stream.encode(None)])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut.mp4", "cut off"),
        ("headless.mp4", "damaged or cut off"),
        ("text.mp4", "cannot be read as a video"),
        ("empty.mp4", "cannot be read as a video"),
        ("still.mkv", "has 1 frame at 10 fps, too few for one pair of frames 1 apart"),
        ("sound.mp4", "has no video"),
    ],
)
def test_what_is_no_demonstration_is_refused(name, words, bad, lam):
    with pytest.raises(DatasetError, match=words):
        encode_video(DemonstrationVideo(bad / name), lam, FPS, 1, True)


def test_a_still_image_is_refused(tmp_path, lam):
    from PIL import Image

    Image.fromarray(numbered(3)[2]).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="has 1 frame"):
        encode_video(DemonstrationVideo.parse(str(tmp_path / "a.png")), lam, FPS, 1, True)


def test_tokens_are_of_the_pairs_a_stride_apart(tmp_path, lam, frames):
    pictures = [frame.permute(1, 2, 0).numpy() for frame in frames[:9]]
    video = DemonstrationVideo(write_video(tmp_path / "a.mkv", pictures, FPS))
    for stride, vq in itertools.product((1, 3), (True, False)):
        values, count = encode_video(video, lam, FPS, stride, vq)
        direct = lam.encode_pairs(frames[: 9 - stride], frames[stride:9])
        assert count == 9
        if vq:
            assert torch.equal(values, direct.indices)
        else:
            assert torch.allclose(values, direct.continuous, atol=1e-4)


@pytest.mark.parametrize("vq", [True, False])
def test_a_folder_becomes_a_store_whose_episodes_guide_like_the_videos(
    vq, tmp_path, lam_folder, frames, capsys
):
    folder = tmp_path / "demos"
    folder.mkdir()
    for name, first, last in (("b.mkv", 20, 31), ("a.mkv", 0, 14)):
        write_video(folder / name, [frame.permute(1, 2, 0).numpy() for frame in frames[first:last]], FPS)
    (folder / "notes.txt").write_text("not a video")
    argv = [
        f"--videos={folder}", f"--fps={FPS}", f"--lam.path={lam_folder}",
        f"--output_dir={tmp_path / 'store'}", "--device=cpu",
        f"--use_vq_tokens={str(vq).lower()}", "--frame_stride=2",
    ]  # fmt: skip
    main(argv)
    told = capsys.readouterr().out
    assert "25 at 10 fps in 2 videos" in told
    assert f"--policy.lam_guidance={tmp_path / 'store'}#0" in told.replace("'", "")
    store = TokenStore.open(tmp_path / "store")
    assert store.provenance.dataset.repo_id == "videos/demos"
    assert store.provenance.dataset.fps == FPS
    assert store.episode_to.tolist() == [14, 25]

    from lerobot_lam_diffusion.policy.guidance import open_guide
    from tests.policies import lam_config

    config = lam_config(
        use_precomputed_lam_tokens=True, lam_token_offsets=[1], lam_model_path=str(lam_folder),
        lam_camera_key="observation.images.top", lam_fps=float(FPS), lam_use_vq_tokens=vq, lam_frame_stride=2,
        lam_guidance=[str(folder / "a.mkv"), str(folder / "b.mkv"), f"{store.path}#0", f"{store.path}#1"],
    )  # fmt: skip
    tracks = [track.tokens for track in open_guide(config).tracks]
    assert torch.equal(tracks[0], tracks[2])
    assert torch.equal(tracks[1], tracks[3])
    assert tracks[0][2:].any(1).all()
    assert not tracks[0][:2].any()
    digest = store.provenance.dataset.digest
    main([*argv[:3], f"--output_dir={tmp_path / 'again'}", *argv[4:]])
    assert json.loads((tmp_path / "again" / "lam_tokens.json").read_text())["dataset"]["digest"] == digest
    with pytest.raises(SystemExit):
        main(argv)  # overwrites nothing

    part = f"--videos={folder / 'a.mkv'}#t=0.5,1.2"
    main([part, *argv[1:3], f"--output_dir={tmp_path / 'part'}", *argv[4:]])
    assert TokenStore.open(tmp_path / "part").episode_to.tolist() == [7]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--dataset.repo_id is missing: the dataset, or --videos="),
        (["--videos=x"], "--fps is missing"),
        (["--videos=x", "--fps=0"], "--fps=0 must be a positive number"),
        (["--videos=x", "--fps=10", "--num_shards=2"], "--num_shards is not for --videos"),
        (["--videos=x", "--fps=10", "--on_error=skip"], "--on_error is not for --videos"),
        (["--videos=x", "--fps=10", "--num_workers=0"], "--num_workers is not for --videos"),
        (["--videos=x", "--dataset.repo_id=a/b"], "two sources of frames"),
        (["--dataset.repo_id=a/b", "--fps=10"], "is for --videos"),
        (["--videos=x", "--fps=10"], "there is no such file"),
    ],
)
def test_flags_that_do_not_go_together(flags, words, lam_folder, tmp_path):
    with pytest.raises(SystemExit) as refused:
        main([*flags, f"--lam.path={lam_folder}", f"--output_dir={tmp_path / 'store'}"])
    assert words in str(refused.value)


def test_a_folder_without_videos(tmp_path):
    with pytest.raises(DatasetError, match="has no videos in it"):
        videos_in(str(tmp_path))
