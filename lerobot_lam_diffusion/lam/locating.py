"""From what a user writes (a folder, a shipped name, a Hub id) to the folder that holds the model."""

import os
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

from lerobot_lam_diffusion.utils.errors import HubError, LamError, shown
from lerobot_lam_diffusion.utils.hub import REPO_ID, fetch

from .config import CONFIG_FILE

WEIGHTS_FILE = "model.safetensors"
ASSETS = Path(__file__).resolve().parent.parent / "assets"
CHECKPOINT_SUFFIXES = (".pt", ".ckpt", ".pth")


class Published(NamedTuple):
    """A LAM that is published as a checkpoint on the Hub, and has to be converted first."""

    file: str
    licence: str


PUBLISHED = {
    "latent-action-pretraining/LAPA-7B-openx": Published("laq_openx.pt", "MIT"),
    "qwbu/univla-latent-action-model": Published("lam-stage-2.ckpt", "Apache-2.0"),
}
"""Hub repository → its checkpoint. The first one also holds 45 GB of labels."""


def resolve_lam(path: str | Path, revision: str | None = None) -> Path:
    """The folder that holds `model_config.json`; a Hub id is downloaded, or found in the offline cache.

    Args:
        path: model folder, or a folder with it as `lam/`; a shipped name; or a Hub id.
        revision: branch, tag or commit, for a Hub id.

    Raises:
        LamError: there is no such model.
    """
    return locate_lam(path, revision)[0]


def recorded_path(path: str) -> str:
    """How a store names its LAM: a folder by its absolute path, so that training finds it from anywhere."""
    folder = Path(path).expanduser()
    return os.path.abspath(folder) if path not in shipped_lams() and folder.is_dir() else path


def locate_lam(path: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """`resolve_lam` together with the commit that a Hub id resolved to."""
    name = str(path)
    if name in shipped_lams():
        return ASSETS / name, None
    try:
        folder = Path(path).expanduser()
        if folder.exists():
            return _model_folder(folder), None
    except (OSError, RuntimeError) as error:  # a name too long, no access; a home that does not exist
        raise LamError(
            f"{shown(name)} cannot be looked up ({error}), expected a LAM folder. Correct the path."
        ) from error
    if name in PUBLISHED:
        raise LamError(
            f"{name!r} is a published checkpoint, expected a LAM folder. Convert it once, and use the folder "
            f"that this writes: lerobot-lam-convert {name} --output_dir=<folder>"
        )
    if REPO_ID.fullmatch(name):
        snapshot = _download(name, revision)
        return _model_folder(snapshot), snapshot.name
    raise LamError(
        f"There is no LAM at {shown(name, 500)}: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
        f"a Hub id such as microsoft/villa-x, or a shipped LAM ({', '.join(shipped_lams())}). Correct the "
        "path."
    )


def shipped_lams() -> list[str]:
    """Names of the LAMs inside this package."""
    return sorted(config.parent.name for config in ASSETS.glob(f"*/{CONFIG_FILE}"))


def _model_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "lam"):
        if isfile(candidate / CONFIG_FILE):
            return candidate
    raise LamError(
        f"{folder} holds no {CONFIG_FILE}, nor does its folder lam/; expected a LAM folder with "
        f"{CONFIG_FILE} and {WEIGHTS_FILE}. Point to that folder, or fetch the model again; a published "
        f"checkpoint ({', '.join(CHECKPOINT_SUFFIXES)}) is converted once, with lerobot-lam-convert "
        "<checkpoint> --output_dir=<folder>."
    )


def _download(repo_id: str, revision: str | None) -> Path:
    files = [f"{prefix}{name}" for prefix in ("", "lam/") for name in (CONFIG_FILE, WEIGHTS_FILE)]
    at = f" at revision {shown(revision)}" if revision else ""
    try:
        return fetch(repo_id, revision, files, "model")
    except HubError as error:
        raise LamError(
            f"There is no LAM at {repo_id!r}{at}: there is no such folder here, and {error}. "
            f"With this package comes {', '.join(shipped_lams())}."
        ) from error
