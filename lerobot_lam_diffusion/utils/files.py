"""Files and folders that are built beside their place, with the permissions that the user's umask asks for.

`tempfile` makes private files and folders, whatever the umask is, and a copied mode is that of another file:
a group that shares a disk could not read such a store, and under umask 077 everybody could.
"""

import secrets
import stat
from pathlib import Path


def partial_name(path: Path) -> Path:
    """Where to build what `path` shall be; no other process or machine chooses the same."""
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(8)}")


def partial_folder(path: Path) -> Path:
    """Make an empty folder to build in what `path` shall be, and return it; the folder of `path` exists.

    Raises:
        OSError: it cannot be made.
    """
    partial = partial_name(path)
    partial.mkdir()
    return partial


def spread_mode(folder: Path) -> None:
    """Give all that is in `folder`, which was made under the user's umask, permissions like its own.

    For what others have written: copies keep the mode of their original, and LeRobot's videos are made by
    `tempfile`. No file in it may be linked from elsewhere.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)
