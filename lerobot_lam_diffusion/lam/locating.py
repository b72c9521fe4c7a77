"""From what a user writes (a folder, a shipped name, a Hub id) to the folder that holds the model."""

from pathlib import Path
from typing import NamedTuple

from lerobot_lam_diffusion.hub import REPO_ID, HubError, fetch
from lerobot_lam_diffusion.reading import is_file, shown

from .config import CONFIG_FILE
from .errors import LamError
from .published import PUBLISHED, convert_hint

WEIGHTS_FILE = "model.safetensors"
ASSETS = Path(__file__).resolve().parent.parent / "assets"


class LamLocation(NamedTuple):
    """Attributes:
    folder: holds `model_config.json` (and should hold `model.safetensors`).
    revision: resolved commit if it came from the Hub, else None.
    """

    folder: Path
    revision: str | None


def resolve_lam(path: str | Path, revision: str | None = None) -> Path:
    """The folder that holds `model_config.json`; a Hub id is downloaded, or found in the offline cache.

    Args:
        path: model folder, or a folder with it as `lam/`; a shipped name; or a Hub id.
        revision: branch, tag or commit, for a Hub id.

    Raises:
        LamError: if there is no such model.
    """
    return locate_lam(path, revision).folder


def locate_lam(path: str | Path, revision: str | None = None) -> LamLocation:
    """`resolve_lam` together with the commit that a Hub id resolved to."""
    if str(path) in shipped_lams():
        return LamLocation(_model_folder(ASSETS / str(path)), None)
    try:
        folder = Path(path).expanduser()
        if folder.is_file() or (not folder.exists() and str(path) in PUBLISHED):
            _refuse_checkpoint(path)
        if folder.exists():
            return LamLocation(_model_folder(folder), None)
    except (OSError, RuntimeError) as error:  # a name too long, no access; a home that does not exist
        raise LamError(
            f"{shown(str(path))} cannot be looked up ({error}), expected a LAM folder. Correct the path."
        ) from error
    if REPO_ID.fullmatch(str(path)):
        snapshot = _download(str(path), revision)
        return LamLocation(_model_folder(snapshot), snapshot.name)
    shipped = ", ".join(shipped_lams()) or "none"
    raise LamError(
        f"There is no LAM at {shown(str(path), 500)}: expected a folder with {CONFIG_FILE} and "
        f"{WEIGHTS_FILE}, a Hub id such as microsoft/villa-x, or a shipped LAM ({shipped}). Correct the path."
    )


def shipped_lams() -> list[str]:
    """Names of the LAMs inside this package."""
    return sorted(config.parent.name for config in ASSETS.glob(f"*/{CONFIG_FILE}"))


def _model_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "lam"):
        if is_file(candidate / CONFIG_FILE):
            return candidate
    _refuse_checkpoint(folder)
    raise LamError(
        f"{folder} holds no {CONFIG_FILE}, nor does its folder lam/; expected a LAM folder with "
        f"{CONFIG_FILE} and {WEIGHTS_FILE}. Point to that folder, or fetch the model again."
    )


def _refuse_checkpoint(path: str | Path) -> None:
    """Raise a LamError with the command to run, where `path` names a checkpoint of another code base."""
    command = convert_hint(path)
    if command is not None:
        raise LamError(
            f"{str(path)!r} is a published checkpoint, expected a LAM folder. Convert it once, and name the "
            f"folder that this writes: {command}"
        )


def _download(repo_id: str, revision: str | None) -> Path:
    files = [f"{prefix}{name}" for prefix in ("", "lam/") for name in (CONFIG_FILE, WEIGHTS_FILE)]
    at = f" at revision {shown(revision)}" if revision else ""
    try:
        return fetch(repo_id, revision, files, "model")
    except HubError as error:
        shipped = f"With this package comes {', '.join(shipped_lams())}."
        raise LamError(
            f"There is no LAM at {repo_id!r}{at}: it is no folder here, and {error}. {shipped}"
        ) from error
