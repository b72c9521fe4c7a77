"""Files that are whole or not there: bytes reach the disk before their name does."""

import os
from pathlib import Path

from lerobot_lam_diffusion.tokens.tensor_file import fsync, sync_file
from lerobot_lam_diffusion.utils.files import partial_name


def write_durably(path: Path, content: bytes) -> Path:
    """Write a new file and have the disk hold its bytes.

    Raises:
        OSError: the disk is full or not writable; names the file, which is removed again.
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            sync_file(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}: writing {len(content):,} bytes", str(path)) from error
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Make `path` hold `content`, whole or not at all, whenever the process or the machine stops."""
    os.replace(write_durably(partial_name(path), content), path)
    fsync(path.parent)
