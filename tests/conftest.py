"""What the tests share: real LeRobot datasets with encoded video, and a LAM with many codes on them."""

import errno
import fcntl
import os
import shutil
import stat
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="lerobot-home-")
os.environ["HF_LEROBOT_HOME"] = _HOME.name  # nothing is written into the user's own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("SVT_LOG", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny: more threads only wait for each other

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.import_utils import get_safe_default_video_backend

from lerobot_lam_diffusion.demo.record import record_pusht
from lerobot_lam_diffusion.lam import LamConfig, load_lam, save_lam
from lerobot_lam_diffusion.lam.quantizer import Quantizer
from lerobot_lam_diffusion.lam.villa_x.decoder import Decoder
from lerobot_lam_diffusion.lam.villa_x.encoder import Encoder
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.tokens import TokenStore
from tests import TOP
from tests.parquet import change_column, data_file

settings.register_profile("untimed", deadline=None)  # machines are busy
settings.load_profile("untimed")

EPISODE_LENGTHS = (14, 9, 17, 8, 12)
FPS = 10
SIZE = 48

SMALL_LAM = LamConfig(
    resolution=32, patch_size=8, d_t=4, encoder_depth=2, encoder_embed_dim=32, encoder_n_heads=4,
    action_latent_dim=32, num_learned_tokens=2, map_heads=4, decoder_depth=1, decoder_embed_dim=16,
    decoder_n_heads=2, n_codes=16,
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("torchcodec")]
    if needing and get_safe_default_video_backend() != "torchcodec":
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="torchcodec needs FFmpeg's shared libraries"))


def record_dataset(
    root: Path,
    lengths: Sequence[int] = EPISODE_LENGTHS,
    cameras: Sequence[str] | dict[str, int] = (TOP,),
    use_videos: bool = True,
    extra: dict[str, dict] | None = None,
    seed: int = 0,
    file_size_mb: float | None = None,
) -> LeRobotDataset:
    """A LeRobot dataset of squares that wander over noise, encoded as LeRobot encodes video.

    Args:
        cameras: Their names, or name → side of its square picture.
        extra: More features, name → `{"dtype": …, "shape": …, "names": …}`; filled with zeros.
        file_size_mb: Video files as large as that, instead of one for all.
    """
    extra = extra or {}
    kind = "video" if use_videos else "image"
    sides = cameras if isinstance(cameras, dict) else dict.fromkeys(cameras, SIZE)
    images = {
        camera: {"dtype": kind, "shape": (side, side, 3), "names": ["height", "width", "channels"]}
        for camera, side in sides.items()
    }
    vector = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    features = {"observation.state": vector, "action": vector, **images, **extra}
    dataset = LeRobotDataset.create(
        "local/squares", FPS, features, root=root, use_videos=use_videos, video_backend="pyav"
    )
    if file_size_mb is not None:
        dataset.meta.update_chunk_settings(video_files_size_in_mb=file_size_mb)  # type: ignore[arg-type]
    generator = np.random.default_rng(seed)
    for length in lengths:
        background = generator.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
        position = generator.uniform(8, SIZE - 16, 2)
        for _ in range(length):
            step = generator.uniform(-6, 6, 2)
            target = np.clip(position + step, 0, SIZE - 12)
            frame = background.copy()
            x, y = position.astype(int)
            frame[y : y + 12, x : x + 12] = (250, 180, 40)
            pixels = {
                camera: _resized(np.roll(frame, 3 * k, axis=0), side)
                for k, (camera, side) in enumerate(sides.items())
            }
            zeros = {name: np.zeros(spec["shape"], spec["dtype"]) for name, spec in extra.items()}
            vectors = {"observation.state": position.astype("float32"), "action": target.astype("float32")}
            dataset.add_frame({**pixels, **vectors, **zeros, "task": "wander"})
            position = target
        dataset.save_episode()
    dataset.finalize()
    return LeRobotDataset("local/squares", root=root, video_backend="pyav", return_uint8=True)


def record_more(root: Path, of: LeRobotDataset, lengths: Sequence[int] = (6, 5)) -> LeRobotDataset:
    """Go on recording into a copy of a dataset, as `lerobot-record --resume=true` does."""
    shutil.copytree(of.root, root)
    writer = LeRobotDataset.resume("local/squares", root=root)
    frames = record_dataset(
        root.with_name("more"), lengths=lengths, use_videos=bool(of.meta.video_keys), seed=5
    )
    for episode, length in enumerate(lengths):
        for step in range(length):
            item = frames[sum(lengths[:episode]) + step]
            picture = item[TOP].permute(1, 2, 0).numpy()
            writer.add_frame(
                {
                    TOP: picture,
                    "observation.state": item["observation.state"],
                    "action": item["action"],
                    "task": "x",
                }
            )
        writer.save_episode()
    writer.finalize()
    return LeRobotDataset("local/squares", root=root, video_backend="pyav", return_uint8=True)


def with_rows_beyond(dataset: LeRobotDataset, root: Path) -> Path:
    """A copy with four rows beyond its last episode, as an interrupted recording leaves them."""
    shutil.copytree(dataset.root, root)
    beyond = data_file(root).with_name("file-001.parquet")
    pq.write_table(pq.read_table(data_file(root)).slice(0, 4), beyond)
    change_column(beyond, "index", range(60, 64))
    change_column(beyond, "episode_index", [5] * 4)
    return root


def _resized(frame: np.ndarray, side: int) -> np.ndarray:
    """The nearest pixels of a square picture `(H, H, 3)`, `(side, side, 3)`."""
    at = np.arange(side) * len(frame) // side
    return frame[at][:, at]


def write_lam(folder: Path, frames: torch.Tensor, seed: int = 0, **changes: object) -> Path:
    """A random LAM whose codebook rows are its own tokens of `frames`, so that many codes occur.

    Args:
        frames: uint8 `(T, 3, H, W)`, at least K + 1 of them.
    """
    config = replace(SMALL_LAM, **changes)
    torch.manual_seed(seed)
    encoder, quantizer, decoder = Encoder(config), Quantizer(config), Decoder(config)
    save_lam(folder, config, encoder, quantizer, decoder)
    tokens = load_lam(folder).encode_pairs(frames[:-1], frames[1:]).continuous
    rows = tokens.unflatten(1, (config.num_learned_tokens, -1)).flatten(0, 1)  # (pairs * n, a)
    # A random encoder gives nearly the same token always: stretch what differs.
    mean, spread = rows.mean(0), rows.std(0)
    last = encoder.map_block.final_proj[0]
    last.weight.data /= spread.unsqueeze(1)
    last.bias.data = (last.bias.data - mean) / spread
    some = rows[torch.randperm(len(rows))[: config.n_codes]]
    quantizer.embedding.weight.data = (some - mean) / spread
    return save_lam(folder, config, encoder, quantizer, decoder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> LeRobotDataset:
    """60 frames in 5 episodes, one camera, encoded video. Not to be changed."""
    return record_dataset(tmp_path_factory.mktemp("squares") / "data")


@pytest.fixture(scope="session")
def frames(dataset) -> torch.Tensor:
    """All its frames by LeRobot's own random access, uint8 `(N, 3, H, W)`."""
    return torch.stack([dataset[i][TOP] for i in range(len(dataset))])


@pytest.fixture(scope="session")
def lam_folder(tmp_path_factory, frames) -> Path:
    """A small LAM (n = 2, a = 32, K = 16) that uses many codes on `dataset`."""
    return write_lam(tmp_path_factory.mktemp("lam"), frames)


@pytest.fixture(scope="session")
def lam(lam_folder):
    return load_lam(lam_folder)


@pytest.fixture(scope="session")
def make_store(tmp_path_factory, lam, lam_folder):
    """Extracts tokens of a dataset: `make_store(dataset, use_vq_tokens=False, frame_stride=3)`."""

    def make(of: LeRobotDataset, camera_key: str = TOP, **options) -> TokenStore:
        folder = tmp_path_factory.mktemp("tokens") / "store"
        return precompute_tokens(
            of,
            lam,
            folder,
            camera_key=camera_key,
            lam_path=str(lam_folder),
            show_progress=False,
            **{"batch_size": 8, **options},
        ).store

    return make


@pytest.fixture(scope="session")
def store(dataset, make_store) -> TokenStore:
    """VQ tokens of `dataset`, stride 1. Not to be changed."""
    return make_store(dataset)


@pytest.fixture(scope="session")
def continuous_store(dataset, make_store) -> TokenStore:
    return make_store(dataset, use_vq_tokens=False)


@pytest.fixture(scope="session")
def pusht(tmp_path_factory) -> LeRobotDataset:
    """2 short PushT demonstrations by the demo's expert, for the shipped LAM."""
    root = tmp_path_factory.mktemp("pusht") / "data"
    record_pusht(root, "local/pusht", 2, near_goal=True)
    return LeRobotDataset("local/pusht", root=root, video_backend="pyav", return_uint8=True)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A LeRobot home with an empty cache."""
    monkeypatch.setattr("lerobot_lam_diffusion.precompute.cache.HF_LEROBOT_HOME", tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def builds(home, monkeypatch) -> list[Path]:
    """The folders into which `lam_tokens_path=auto` extracts stores."""
    folders = []

    def noted(dataset, lam, output_dir, **options):
        folders.append(output_dir)
        return precompute_tokens(dataset, lam, output_dir, **options)

    monkeypatch.setattr("lerobot_lam_diffusion.policy.auto.precompute_tokens", noted)
    return folders


@pytest.fixture
def without_locks(monkeypatch) -> None:
    """Files cannot be locked, as on network disks whose server has no lock service."""

    def refuse(*_args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def without_links(monkeypatch) -> None:
    """A file cannot have a second name, as on exFAT."""

    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", refuse)


@pytest.fixture
def without_folder_sync(monkeypatch) -> None:
    """`fsync` of a folder is refused, as by CIFS."""
    fsync = os.fsync

    def of_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files)
