"""Remember which stores were read from end to end and found intact.

Reading gigabytes again before every training run, in every process, would reveal nothing new. Checking a
store leaves a stamp, a tiny file under LeRobot's home; the store is trusted as long as its files keep their
size, inode and times (the inode's ctime cannot be set back). A stamp that cannot be written or read costs
another check, but never raises an error.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from lerobot.utils.constants import HF_LEROBOT_HOME

from lerobot_lam_diffusion.utils.files import write_whole

logger = logging.getLogger(__name__)

STAMP_FORMAT = 2

_checked_here: dict[Path, str] = {}  # where no stamp can be written, once per process


def stamp_of(*files: Path) -> str:
    """Size, inode and times of a store's files, without reading them."""
    states = {}
    for file in files:
        stat = file.stat()
        states[file.name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return json.dumps({"format": STAMP_FORMAT, "files": states}, sort_keys=True)


def is_checked(folder: Path, stamp: str) -> bool:
    """Whether the store `folder` was found whole when it looked like `stamp`."""
    place = _place(folder)
    return _checked_here.get(place) == stamp or read_note(place) == stamp


def remember(folder: Path, stamp: str) -> None:
    """Note that the store `folder`, which looks like `stamp`, is whole."""
    place = _place(folder)
    _checked_here[place] = stamp
    write_note(place, stamp)


def read_note(place: Path) -> str | None:
    """What `write_note` wrote there, or None."""
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, ValueError):  # ValueError: not UTF-8
        return None


def note_of(kind: str, root: Path, camera_key: str) -> Path:
    """Where a note on a dataset's camera is kept."""
    name = hashlib.sha256(os.fsencode(root.resolve()) + b"\0" + camera_key.encode()).hexdigest()
    return HF_LEROBOT_HOME / "lam_tokens" / kind / name


def recall(place: Path, stamp: str) -> Any:
    """The value noted by `note` for files that look like `stamp`; None if there is none."""
    try:
        known = json.loads(read_note(place) or "null")
    except ValueError:  # damaged
        return None
    return known[1] if isinstance(known, list) and len(known) == 2 and known[0] == stamp else None


def note(place: Path, stamp: str, value: Any) -> None:
    """Keep a JSON value for `recall`."""
    write_note(place, json.dumps([stamp, value]))


def write_note(place: Path, text: str) -> None:
    """Write a small file whole or not at all; one that cannot be written is no error."""
    try:
        write_whole(place, text)
    except OSError as error:
        logger.debug("%s cannot be kept for the next process: %s", place, error)


def _place(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return HF_LEROBOT_HOME / "lam_tokens" / "checked" / name
