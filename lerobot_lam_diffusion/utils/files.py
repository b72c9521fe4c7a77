"""Files and folders that appear whole or not at all, and small documents that may be damaged or hostile."""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lerobot_lam_diffusion.utils.errors import first_line

logger = logging.getLogger(__name__)

DOCUMENT_BYTES = 1 << 20  # our largest are some kilobytes
NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""What file systems answer to a call that they do not have."""


@contextmanager
def whole_or_nothing(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a file or folder under another name, sync it to disk, and rename it to `path`.

    The `with` block must create the yielded path itself, using `mkdir` or `open`, which respect the user's
    umask (`tempfile` does not). If the block raises or the process is killed, `path` is unchanged;
    `remove_partial` removes what a killed process leaves behind.

    Args:
        path: Its parent folders are created.
        replace: Overwrite an existing file. False: see `refuse_existing`.

    Yields:
        The temporary path to build at; no other process or machine chooses the same one.

    Raises:
        FileExistsError: without `replace`, something appeared at `path` in the meantime; it is kept.
        OSError: the disk is full or not writable; names the file.
    """
    # "." has no name to extend, and a folder cannot be renamed onto a link; a file replaces a link.
    path = path.parent.resolve() / path.name if replace else path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(8)}")
    try:
        yield partial
        # The bytes reach the disk before their name does.
        for each in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
            fsync(each)
        if replace:
            os.replace(partial, path)
        elif partial.is_file():
            _link_new(partial, path)
        else:
            _rename_new(partial, path)
        fsync(path.parent)
    except OSError as error:
        if error.errno and error.filename is None:  # a failed write does not say which file it was
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        _remove(partial)


def write_whole(path: Path, content: bytes | str) -> None:
    """Make the file `path` hold `content`, whole or not at all, whenever the process or the machine stops.

    Raises:
        OSError: the disk is full or not writable; names the file.
    """
    with whole_or_nothing(path, replace=True) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock on the file `path`, made with its folders; the kernel frees that of a process that dies.

    Yields:
        Whether it is held: not on a file system without locks, where nobody waits for anybody.

    Raises:
        Timeout: without `wait`, another process holds it.
        OSError: its file cannot be made or opened.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not wait:
                raise
            logger.info("Waiting for another process, which holds %s.", path)
            lock.acquire(poll_interval=0.2)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_SUPPORTED:
            raise
        if wait:
            logger.warning("%s cannot be locked (%s); continuing without a lock.", path.parent, error)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def remove_whole(folder: Path) -> None:
    """Remove a folder so that nobody ever sees half of it; one that is not there is no error."""
    removed = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(8)}")
    try:
        folder.rename(removed)
    except FileNotFoundError:  # another process was faster, or there is none
        return
    shutil.rmtree(removed, ignore_errors=True)


def remove_partial(path: Path) -> None:
    """Remove what killed processes left of `path`; no other may be building it now."""
    path = path.resolve()
    for partial in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        _remove(partial)


def refuse_existing(path: Path, flag: str = "--output_dir") -> None:
    """Refuse to write where something is already, or where nothing can be.

    Raises:
        FileExistsError: `path` is a file or a folder that is not empty.
        NotADirectoryError, PermissionError: nothing can be made there.
    """
    if path.is_symlink() and not path.exists():
        raise FileExistsError(f"{path} is a link to nowhere; choose another {flag} or remove it first")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "exists already and is not empty" if path.is_dir() else "exists already"
        raise FileExistsError(f"{path} {what}; choose another {flag} or remove it first")
    if os.path.ismount(path):
        raise FileExistsError(
            f"{path} is a mount point, onto which nothing can be renamed; choose a folder in it for {flag}"
        )
    ground = next(parent for parent in path.resolve().parents if parent.exists())
    if not ground.is_dir():
        raise NotADirectoryError(f"{path} cannot be made: {ground} is a file; choose another {flag}")
    if not os.access(ground, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be made: {ground} is not writable; choose another {flag}")


def fsync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk before anything relies on them.

    Folders are synced where the file system can (CIFS and some FUSE file systems cannot).

    Raises:
        OSError: the disk did not take a file's bytes.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not path.is_dir() and error.errno not in NOT_SUPPORTED:
            raise
        logger.debug("%s cannot be synced: %s", path, error)


def spread_mode(folder: Path) -> None:
    """Give everything in `folder`, which was created under the user's umask, the folder's own permissions.

    This is for files written by other code: copies keep the mode of their original, and LeRobot's videos are
    created with `tempfile`. No file in the folder may be hard-linked from elsewhere.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


class UnreadableError(ValueError):
    """Why a file cannot be read; its message is a phrase, without the file's name."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_regular(path: Path) -> None:
    """Refuse what cannot be read to its end: a pipe or a device could block, or never end.

    Raises:
        UnreadableError: absent, a folder, a pipe or a device.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UnreadableError(first_line(error)) from error
    if not regular:
        raise UnreadableError("it is a folder, a pipe or a device, expected a file")


def read_json(path: Path, at_most: int = DOCUMENT_BYTES) -> Any:
    """A small JSON document.

    Raises:
        UnreadableError: see `check_regular`; or not UTF-8 JSON, nested too deeply, or larger than `at_most`
            bytes.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(at_most + 1)
        if len(content) > at_most:
            raise UnreadableError(f"it is larger than {at_most} bytes, no such document is")
        return json.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableError(first_line(error)) from error


def _link_new(partial: Path, path: Path) -> None:
    """Give a file its name, unless another process was faster: a rename would overwrite that one's file."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        refuse_existing(path)
        partial.rename(path)


def _rename_new(partial: Path, path: Path) -> None:
    """Rename to a name that nothing, or an empty folder, has."""
    refuse_existing(path)  # building may have taken long
    try:
        if path.is_dir():
            path.rmdir()  # some file systems rename nothing onto an empty folder
        partial.rename(path)
    except OSError:
        refuse_existing(path)  # another process was faster
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
