"""Notes on files that were read from end to end, so that the next process need not read them again.

Reading gigabytes again before every training run, in every process, would reveal nothing new. What was found
is noted in a tiny file under LeRobot's home, together with a stamp: the size, inode and times of the files
that were read. The note holds for as long as they keep that stamp (the inode's ctime cannot be set back). A
note that cannot be written or read costs another reading, but never raises an error.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lerobot.utils.constants import HF_LEROBOT_HOME

from lerobot_lam_diffusion.utils.files import write_whole

logger = logging.getLogger(__name__)

STAMP_FORMAT = 3

_noted: dict[Path, tuple[str, Any]] = {}  # where no note can be written, once per process


def stamp_of(files: Iterable[Path], root: Path) -> str:
    """Size, inode and times of files below `root`, without reading them.

    Raises:
        OSError: one is absent.
    """
    digest = hashlib.sha256(str(STAMP_FORMAT).encode())
    for file in files:
        stat = file.stat()
        looks = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        digest.update(os.fsencode(file.relative_to(root)) + repr(looks).encode())
    return digest.hexdigest()


def place_of(kind: str, folder: Path, detail: str = "") -> Path:
    """Where the note of this kind on a folder (or on some `detail` of it) is kept."""
    name = hashlib.sha256(os.fsencode(folder.resolve()) + b"\0" + detail.encode()).hexdigest()
    return HF_LEROBOT_HOME / "lam_tokens" / kind / name


def recall(place: Path, stamp: str) -> Any:
    """The value noted by `note` for files that look like `stamp`; None if there is none."""
    if place in _noted and _noted[place][0] == stamp:
        return _noted[place][1]
    try:
        noted, value = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # there is none, or it is damaged
        return None
    return value if noted == stamp else None


def note(place: Path, stamp: str, value: Any) -> None:
    """Keep a JSON value for `recall`."""
    try:
        write_whole(place, json.dumps([stamp, value]))
    except OSError as error:
        _noted[place] = (stamp, value)
        logger.debug("%s cannot be kept for the next process: %s", place, error)
