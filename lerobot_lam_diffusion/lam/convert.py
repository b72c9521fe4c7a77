"""Convert published checkpoints of third-party LAMs to our LAM folders.

A checkpoint lacks dimensions that determine its tokens, is a pickle, and is two to four times larger than
tokens require. It is therefore converted once, to a folder like that of any other LAM.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from types import ModuleType

from torch import Tensor

from lerobot_lam_diffusion.utils.errors import HubError, LamError, shown
from lerobot_lam_diffusion.utils.files import sha256_of
from lerobot_lam_diffusion.utils.hub import REPO_ID, fetch

from .base import LatentActionModel
from .checkpoint import Dims, check_tensors, open_checkpoint
from .lapa import LapaLam
from .lapa import convert as lapa
from .loading import load_lam, meta_modules, state_of, write_lam
from .locating import CHECKPOINT_SUFFIXES, PUBLISHED
from .univla import UniVlaLam
from .univla import convert as univla

CONVERTERS: dict[str, tuple[type[LatentActionModel], ModuleType]] = {
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
    """The checkpoint file that a user names; of a Hub repository only that file is fetched.

    Args:
        source: A file, the Hub id of published weights, or `owner/name/path/in/it.pt`.
        revision: Branch, tag or commit, for the Hub.

    Raises:
        LamError: there is no such checkpoint.
    """
    local = Path(source).expanduser()
    if isfile(local):
        return Source(local)
    repo_id, file = _on_the_hub(source)
    if local.exists() or file is None:
        raise LamError(
            f"There is no checkpoint at {shown(source, 500)}, expected a file "
            f"({', '.join(CHECKPOINT_SUFFIXES)}), a Hub id of published weights ({', '.join(PUBLISHED)}) or "
            "owner/name/path/to/file.pt. Correct the name."
        )
    try:
        snapshot = fetch(repo_id, revision, [file], "model")
    except HubError as error:
        raise LamError(f"There is no checkpoint at {source!r}: {error}.") from error
    if not isfile(snapshot / file):
        raise LamError(
            f"The Hub's {repo_id} has no file {file} at {snapshot.name[:12]}, expected the checkpoint there. "
            "Correct its name, or name another --revision."
        )
    published = PUBLISHED.get(repo_id)
    licence = published.licence if published is not None and published.file == file else None
    return Source(snapshot / file, repo_id, snapshot.name, licence)


def _on_the_hub(source: str) -> tuple[str, str | None]:
    """Repository and file of a published id, or of `owner/name/path/in/it.pt`; None: neither."""
    if source in PUBLISHED:
        return source, PUBLISHED[source].file
    parts = source.split("/")
    repo_id, file = "/".join(parts[:2]), "/".join(parts[2:])
    # The Hub client takes patterns, and no part may lead out of the cache.
    plain = all(part and not part.startswith(".") and not set(part) & set("*?[]\\") for part in parts)
    found = plain and file.endswith(CHECKPOINT_SUFFIXES) and REPO_ID.fullmatch(repo_id)
    return repo_id, file if found else None


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
        dims: Dimensions that the file does not contain; the published values if left out.
        keep_fdm: Keep the part that predicts frames; LAPA only.

    Returns:
        The folder.

    Raises:
        LamError: no such checkpoint, or not of that family; lists all missing, unexpected and misshapen
            tensors.
    """
    path, dims = source.path, dims or Dims()
    tensors = open_checkpoint(path)
    family = _recognised(path, tensors, family)
    lam, translator = CONVERTERS[family]
    unused = [f"--dims.{name}" for name, value in vars(dims).items() if value and name not in translator.DIMS]
    if unused:
        raise LamError(
            f"{', '.join(unused)} means nothing for {family}, expected of --dims. only "
            f"{', '.join(translator.DIMS)}. Leave it out."
        )
    translation = translator.translate(path, tensors, dims, keep_fdm)
    ours = state_of(meta_modules(lam, translation.config))
    check_tensors(path, tensors, translation.expected(ours), translation.unused)
    config = dataclasses.replace(
        translation.config,
        source_file=path.name,
        source_sha256=sha256_of(path),
        source_repository=source.repository,
        source_revision=source.revision,
        licence=source.licence,
    )
    about = f"converted from {path.name}" + (f" of {source.repository}" if source.repository else "")
    converted = {key: tensor.float() for key, tensor in translation.state(ours, tensors).items()}
    write_lam(output_dir, lam, config, converted, description=about, version=1)
    load_lam(output_dir)
    return output_dir


def _recognised(path: Path, state: Mapping[str, Tensor], wanted: str | None) -> str:
    """The family whose keys these are.

    Raises:
        LamError: none, or another one than wanted.
    """
    found = next((name for name, (_, translator) in CONVERTERS.items() if translator.is_ours(state)), None)
    if found is None:
        raise LamError(
            f"{path} is not a checkpoint of a known family (its keys begin "
            f"{shown(sorted(state)[:4], 200)}), expected one of {', '.join(CONVERTERS)}. Name another one."
        )
    if wanted not in (None, found):
        raise LamError(
            f"{path} is a checkpoint of {found}, but --family={wanted}. Leave --family out, or name "
            "another checkpoint."
        )
    return found
