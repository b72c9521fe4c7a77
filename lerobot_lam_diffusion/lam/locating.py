"""From what a user writes (a folder, a shipped name, a Hub id) to the folder that holds the model."""

import re
from pathlib import Path
from typing import NamedTuple

from lerobot_lam_diffusion.reading import is_file, shown

from .config import CONFIG_FILE
from .errors import LamError

WEIGHTS_FILE = "model.safetensors"
ASSETS = Path(__file__).resolve().parent.parent / "assets"

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_REVISION = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)*")  # no way out of the cache's folder of branches


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
        if folder.exists():
            return LamLocation(_model_folder(folder), None)
    except (OSError, RuntimeError) as error:  # a name too long, no access; a home that does not exist
        raise LamError(
            f"{shown(str(path))} cannot be looked up ({error}), expected a LAM folder. Correct the path."
        ) from error
    if _HUB_ID.fullmatch(str(path)):
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
    raise LamError(
        f"{folder} holds no {CONFIG_FILE}, nor does its folder lam/; expected a LAM folder with "
        f"{CONFIG_FILE} and {WEIGHTS_FILE}. Point to that folder, or fetch the model again."
    )


def _download(repo_id: str, revision: str | None) -> Path:
    # Imported here: huggingface_hub costs 0.3 s, and a local folder needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [f"{prefix}{name}" for prefix in ("", "lam/") for name in (CONFIG_FILE, WEIGHTS_FILE)]
    at = f" at revision {revision!r}" if revision else ""
    if revision is not None and not _REVISION.fullmatch(revision):
        raise LamError(
            f"{repo_id!r} has no revision {shown(revision)}, expected a branch, tag or commit. Correct it."
        )
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except LocalEntryNotFoundError as error:
        raise LamError(
            f"{repo_id!r}{at} is no folder here nor in the Hub cache, and the Hub could not be reached, "
            "expected one of them. Go online once (unset HF_HUB_OFFLINE), or pass the path of a local copy."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: no possible id, by the Hub's rules
        raise LamError(
            f"{repo_id!r}{at} is no folder here and the Hub did not deliver it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); expected a Hub "
            "repository with a LAM. Correct the id or the revision, log in if private, or pass a folder."
        ) from error
