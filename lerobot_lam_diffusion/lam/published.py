"""LAMs that are published as checkpoints, and how to say that one has to be converted first."""

import shlex
from pathlib import Path
from typing import NamedTuple

from lerobot_lam_diffusion.hub import REPO_ID

CHECKPOINT_SUFFIXES = (".pt", ".ckpt", ".pth")


class Published(NamedTuple):
    """A checkpoint file on the Hub."""

    family: str
    file: str
    licence: str


PUBLISHED = {
    "latent-action-pretraining/LAPA-7B-openx": Published("lapa", "laq_openx.pt", "MIT"),
    "qwbu/univla-latent-action-model": Published("univla", "lam-stage-2.ckpt", "Apache-2.0"),
}
"""Hub repository → its checkpoint. The first one also holds 45 GB of labels."""


def file_on_the_hub(source: str) -> tuple[str, str] | None:
    """Repository and file that a name stands for: a published id, or `owner/name/path/in/it.pt`."""
    if source in PUBLISHED:
        return source, PUBLISHED[source].file
    parts = source.split("/")
    repo_id, file = "/".join(parts[:2]), "/".join(parts[2:])
    plain = all(part and not part.startswith(".") and not set(part) & set("*?[]\\") for part in parts)
    if plain and file.endswith(CHECKPOINT_SUFFIXES) and REPO_ID.fullmatch(repo_id):
        return repo_id, file
    return None


def convert_hint(path: str | Path) -> str | None:
    """The command that makes a LAM folder of a checkpoint, if that is what `path` names."""
    text = str(path)
    local = Path(text).expanduser()
    if local.exists() or text not in PUBLISHED:
        checkpoints = [local] if local.is_file() else _checkpoints_in(local)
        if not checkpoints or checkpoints[0].suffix not in CHECKPOINT_SUFFIXES:
            return None
        text, name = str(checkpoints[0]), checkpoints[0].stem
    else:
        name = PUBLISHED[text].family
    return f"lerobot-lam-convert {shlex.quote(text)} --output_dir=./data/{shlex.quote(name)}_lam"


def _checkpoints_in(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if each.suffix in CHECKPOINT_SUFFIXES)
    except OSError:
        return []
