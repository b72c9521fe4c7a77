"""torchcodec on a machine without FFmpeg's shared libraries, on every machine.

`python tests/torchcodec_states.py FOLDER` writes it there; with FOLDER on PYTHONPATH it is what is found.
"""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


def without_ffmpeg(folder: Path) -> Path:
    """Copy the installed torchcodec into `folder`, its native libraries linked to an FFmpeg that nobody has.

    Importing the copy fails as the real one does on a machine without FFmpeg: the dynamic loader does not
    find `libavutil`, for each version of FFmpeg in turn, and torchcodec raises RuntimeError.

    Returns:
        `folder`, for `sys.path`.
    """
    spec = find_spec("torchcodec")
    assert spec is not None, "LeRobot requires torchcodec on this platform"
    assert spec.submodule_search_locations
    copy = Path(shutil.copytree(spec.submodule_search_locations[0], folder / "torchcodec"))
    for library in copy.rglob("*.so"):
        library.write_bytes(library.read_bytes().replace(b"libavutil.so.", b"libabsent.so."))
    return folder


if __name__ == "__main__":
    without_ffmpeg(Path(sys.argv[1]))
