"""Published checkpoints of other people's LAMs → LAM folders of ours.

A checkpoint lacks dimensions that decide its tokens, is a pickle, and is two to four times larger than what
tokens need. So it is opened once, by a person; from then on there is a folder as of any other LAM.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import Tensor

from lerobot_lam_diffusion.hub import HubError, fetch
from lerobot_lam_diffusion.reading import is_file, shown

from .base import LatentActionModel
from .converting import Dims, check_tensors, open_checkpoint
from .errors import LamError
from .lapa import LapaLam
from .lapa import convert as lapa
from .loading import load_lam, write_lam
from .published import CHECKPOINT_SUFFIXES, PUBLISHED, file_on_the_hub
from .univla import UniVlaLam
from .univla import convert as univla

FAMILIES: dict[str, tuple[type[LatentActionModel], ModuleType]] = {
    "lapa": (LapaLam, lapa),
    "univla": (UniVlaLam, univla),
}
"""Name of `--family` → its class, and the module that translates its checkpoints."""


@dataclass(frozen=True)
class Source:
    """A checkpoint file and where it is from."""

    path: Path
    repository: str | None = None
    revision: str | None = None
    licence: str | None = None


def locate_checkpoint(source: str, revision: str | None = None) -> Source:
    """The checkpoint file that a user names; of a Hub repository that one file alone is fetched.

    Args:
        source: A file, the Hub id of published weights, or `owner/name/path/in/it.pt`.
        revision: Branch, tag or commit, for the Hub.

    Raises:
        LamError: there is no such checkpoint.
    """
    local = Path(source).expanduser()
    on_the_hub = None if local.exists() else file_on_the_hub(source)
    if on_the_hub is None:
        if is_file(local):
            return Source(local)
        raise LamError(
            f"There is no checkpoint at {shown(source, 500)}, expected a file "
            f"({', '.join(CHECKPOINT_SUFFIXES)}), "
            f"a Hub id of published weights ({', '.join(PUBLISHED)}) or owner/name/path/to/file.pt. Correct "
            "the name."
        )
    repo_id, file = on_the_hub
    try:
        snapshot = fetch(repo_id, revision, [file], "model")
    except HubError as error:
        raise LamError(f"There is no checkpoint at {source!r}: {error}.") from error
    if not is_file(snapshot / file):
        raise LamError(
            f"The Hub's {repo_id} has no file {file} at {snapshot.name[:12]}, expected the checkpoint there. "
            "Correct its name, or name another --revision."
        )
    published = PUBLISHED.get(repo_id)
    licence = published.licence if published is not None and published.file == file else None
    return Source(snapshot / file, repo_id, snapshot.name, licence)


def convert_lam(
    source: Source,
    output_dir: Path,
    *,
    family: str | None = None,
    dims: Dims | None = None,
    keep_fdm: bool = False,
) -> Path:
    """Write the LAM folder of a published checkpoint, and open it once as a check.

    Args:
        source: See `locate_checkpoint`.
        output_dir: The new folder.
        family: "lapa" or "univla"; recognised if None.
        dims: What the file does not tell; the published values if left out.
        keep_fdm: Keep what predicts frames; LAPA only.

    Returns:
        The folder.

    Raises:
        LamError: no such checkpoint, or not of that family; all missing, unexpected and misshapen tensors at
            once.
    """
    path = source.path
    state = open_checkpoint(path)
    family = recognised(path, state, family)
    lam, translator = FAMILIES[family]
    state = translator.own_keys(state)
    told = dims or Dims()
    unused = [f"--dims.{name}" for name in vars(told) if vars(told)[name] and name not in translator.DIMS]
    if unused:
        raise LamError(
            f"{', '.join(unused)} means nothing for {family}, expected of --dims. only "
            f"{', '.join(translator.DIMS)}. Leave it out."
        )
    translation = translator.translate(path, state, told, keep_fdm)
    check_tensors(path, state, translation.expected)
    config = dataclasses.replace(
        translation.config,
        source_file=path.name,
        source_sha256=sha256_of(path),
        source_repository=source.repository,
        source_revision=source.revision,
        licence=source.licence,
    )
    about = f"converted from {path.name}" + (f" of {source.repository}" if source.repository else "")
    write_lam(output_dir, lam, config, translation.state(state), description=about, version=1)
    load_lam(output_dir)
    return output_dir


def recognised(path: Path, state: Mapping[str, Tensor], wanted: str | None) -> str:
    """The family whose keys these are.

    Raises:
        LamError: none, or another one than wanted.
    """
    found = [name for name, (_, translator) in FAMILIES.items() if translator.is_ours(state)]
    if wanted is not None and wanted not in FAMILIES:
        raise LamError(f"--family={wanted} is unknown, expected one of {', '.join(FAMILIES)}. Choose one.")
    if not found:
        raise LamError(
            f"{path} is a checkpoint of no family known here (its keys begin "
            f"{shown(sorted(state)[:4], 200)}), "
            f"expected one of {', '.join(FAMILIES)}. Name another checkpoint."
        )
    if wanted not in (None, *found):
        raise LamError(
            f"{path} is a checkpoint of {found[0]}, but --family={wanted}. Leave --family out, or name "
            "another checkpoint."
        )
    return found[0]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
