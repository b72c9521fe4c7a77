"""What the tests of an extraction share."""

import pytest

from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from tests.conftest import TOP, record_dataset


class Wrapped:
    """A LAM whose `encode_pairs` is another."""

    def __init__(self, lam, encode_pairs) -> None:
        self._lam = lam
        self.encode_pairs = encode_pairs

    def __getattr__(self, name):
        return getattr(self._lam, name)


@pytest.fixture
def extract(dataset, lam, tmp_path):
    """`extract(lam=…, **options)` of `dataset` into `tmp_path / "store"`; gives the summary."""

    def run(lam=lam, of=dataset, camera_key=TOP, output_dir=tmp_path / "store", **options):
        options = {"batch_size": 8, "show_progress": False, **options}
        return precompute_tokens(of, lam, output_dir, camera_key=camera_key, lam_path="a/lam", **options)

    return run


@pytest.fixture
def unreadable(tmp_path):
    """A dataset whose only video is a git-lfs pointer; and the video."""
    recorded = record_dataset(tmp_path / "data", (5, 3))
    path = recorded.root / recorded.meta.get_video_file_path(0, TOP)
    video = path.read_bytes()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return recorded, path, video
