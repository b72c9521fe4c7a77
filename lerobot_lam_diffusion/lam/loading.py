"""Find, open and write LAM folders: `model_config.json` + `model.safetensors`, strict on keys and shapes."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lerobot_lam_diffusion.utils.errors import LamError, first_line, one_line, raise_problems, shown
from lerobot_lam_diffusion.utils.files import UnreadableError, check_regular, write_whole

from .base import LatentActionModel
from .config import CONFIG_FILE, read_document
from .locating import WEIGHTS_FILE, locate_lam, resolve_lam

FAMILIES = {
    "IgorModel": "lerobot_lam_diffusion.lam.villa_x:VillaXLam",
    "LapaLaq": "lerobot_lam_diffusion.lam.lapa:LapaLam",
    "UniVlaLam": "lerobot_lam_diffusion.lam.univla:UniVlaLam",
}
"""Architecture in `model_config.json` → the family's class, imported when such a folder is opened."""

ENTRY_POINTS = "lerobot_lam_diffusion.lams"
"""Group in which an installed package names families of its own, `architecture = "module:Class"`."""

_registered: dict[str, type[LatentActionModel]] = {}
_fingerprints: dict[tuple, str] = {}
_DTYPES = (torch.float32, torch.bfloat16)
_REMEDY = "Fetch or write the model folder again: weights and config must belong together."

# Families.


def register_lam[Family: type[LatentActionModel]](family: Family) -> Family:
    """Class decorator: `load_lam` opens folders of this family's `architecture` from now on.

    Raises:
        LamError: the name is taken.
    """
    name = family.architecture
    taken = FAMILIES.get(name) or _registered.get(name)
    # The same class again, from a module that was reloaded, is no conflict.
    if taken is not None and _spelled(taken) != _spelled(family):
        raise LamError(
            f"The architecture {name!r} of {family.__qualname__} is taken by {shown(taken)}. Choose another."
        )
    _registered[name] = family
    return family


def _spelled(family: Any) -> str:
    """`module:Class` of a family, whether or not it is imported."""
    return family if isinstance(family, str) else f"{family.__module__}:{family.__qualname__}"


def family_of(folder: Path, architecture: Any) -> type[LatentActionModel]:
    """The class that opens folders of this architecture.

    Raises:
        LamError: there is none.
    """
    if isinstance(architecture, str):
        if architecture in FAMILIES:
            module, _, name = FAMILIES[architecture].partition(":")
            return getattr(import_module(module), name)
        if architecture in _registered:
            return _registered[architecture]
        for each in entry_points(group=ENTRY_POINTS, name=architecture):
            return each.load()
    installed = [each.name for each in entry_points(group=ENTRY_POINTS)]
    known = ", ".join(map(repr, sorted({*FAMILIES, *_registered, *installed})))
    raise LamError(
        f"{folder / CONFIG_FILE} names the architecture {shown(architecture)}, expected one of {known}. "
        "Point to a LAM of those, or install the package that brings this one."
    )


def read_config(folder: Path) -> Any:
    """The config of a model folder's LAM; no weights are read.

    Raises:
        LamError: the file is absent, of an unknown architecture or not a possible model.
    """
    return _read_config(folder)[1]


def _read_config(folder: Path) -> tuple[type[LatentActionModel], Any]:
    document = read_document(folder)
    family = family_of(folder, document.get("architecture"))
    try:
        return family, family.config_class.from_dict(document.get("config", {}))
    except LamError as error:
        raise LamError(f"{folder / CONFIG_FILE}: {error}") from None


# Opening and writing folders.


def load_lam(
    path: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fdm: bool = False,
) -> Any:
    """Open a latent action model; only the parts that make tokens are read unless `fdm` is set.

    Args:
        path: model folder (or one with it as `lam/`), a shipped name such as `pusht-compact`, or a Hub id.
        revision: branch, tag or commit, for a Hub id.
        device: where the model computes.
        dtype: compute dtype of the networks, torch.float32 or torch.bfloat16; the quantiser stays in float32.
        fdm: also load the decoder, for `predict_next`.

    Raises:
        LamError: the model cannot be found or opened; lists all problems of its weights.
    """
    if dtype not in _DTYPES:
        raise LamError(f"The LAM's dtype is {dtype}, expected torch.float32 or torch.bfloat16. Choose one.")
    folder, commit = locate_lam(path, revision)
    family, config = _read_config(folder)
    with open_weights(folder) as weights:
        modules = _loaded_modules(weights, folder / WEIGHTS_FILE, family, config, dtype, device, fdm)
        fingerprint = _fingerprint(weights, folder / WEIGHTS_FILE, family, config)
    return family(
        config, modules, path=folder, revision=commit, fingerprint=fingerprint, dtype=dtype, device=device
    )


def save_lam(
    folder: str | Path,
    config: Any,
    encoder: nn.Module,
    vq: nn.Module,
    decoder: nn.Module,
    *,
    description: str = "",
    version: int = 0,
    fdm_dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a villa-X model folder that `load_lam` (and the villa-X code) opens; each file appears whole.

    Args:
        fdm_dtype: Stored dtype of the decoder, torch.float32 or torch.float16; not part of the fingerprint.

    Returns:
        The folder.
    """
    from .villa_x import VillaXLam

    state = {key: tensor.float() for key, tensor in state_of({"encoder": encoder, "vq": vq}).items()}
    state |= {key: tensor.to(fdm_dtype) for key, tensor in state_of({"decoder": decoder}).items()}
    return write_lam(Path(folder), VillaXLam, config, state, description=description, version=version)


def write_lam(
    folder: Path,
    family: type[LatentActionModel],
    config: Any,
    state: Mapping[str, Tensor],
    *,
    description: str = "",
    version: int = 0,
) -> Path:
    """Write a model folder of any family; each of its two files is written atomically.

    Args:
        folder: Created if it does not exist.
        family: Family whose `architecture` is recorded and that opens the folder again.
        config: Instance of the family's `config_class`.
        state: Key in `model.safetensors` (`part.name`) → tensor, kept in its dtype. May be empty.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    document = {
        "architecture": family.architecture,
        "description": description,
        "version": version,
        "config": config.to_dict(),
    }
    write_whole(folder / WEIGHTS_FILE, save(tensors))  # `save_file` makes private files
    write_whole(folder / CONFIG_FILE, json.dumps(document, indent=2) + "\n")
    return folder


def state_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of named modules by their keys in `model.safetensors`, `part.name`."""
    return {
        f"{part}.{name}": tensor
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def meta_modules(family: type[LatentActionModel], config: Any) -> dict[str, nn.Module]:
    """The modules without memory behind their weights.

    Raises:
        LamError: no tensor can be as large as the config says, or it is not known whether tokens depend on
            a module.
    """
    try:
        with torch.device("meta"):
            modules = family.build_modules(config)
    except RuntimeError as error:
        raise LamError(
            f"A LAM of these dimensions cannot be built ({first_line(error)}). {_REMEDY}"
        ) from error
    undeclared = modules.keys() - {*family.token_parts, *family.fdm_parts, *family.other_parts}
    if undeclared:
        raise LamError(
            f"{family.__qualname__} has the modules {sorted(undeclared)}, but its fingerprint covers only "
            f"those in token_parts={family.token_parts}. Name them there, or in fdm_parts or other_parts."
        )
    return modules


def _loaded_modules(
    weights: safe_open,
    path: Path,
    family: type[LatentActionModel],
    config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    fdm: bool,
) -> dict[str, nn.Module]:
    """The modules with their weights; the FDM only if it is asked for."""
    modules, keys = meta_modules(family, config), weights.keys()
    parts = {key.split(".")[0] for key in keys}
    if fdm and not parts >= set(family.fdm_parts):
        raise LamError(
            f"{path} holds no FDM, expected one for predicting frames. Fetch a model that has one, "
            "or convert the original checkpoint again with lerobot-lam-convert … --keep_fdm=true."
        )
    wanted = {part: each for part, each in modules.items() if fdm or part not in family.fdm_parts}
    problems = [f"unexpected part {shown(part)}" for part in sorted(parts - modules.keys())]
    for part, module in wanted.items():
        names = [key.removeprefix(f"{part}.") for key in keys if key.startswith(f"{part}.")]
        part_dtype = torch.float32 if part == "vq" else dtype
        state = {name: _finite(weights, path, f"{part}.{name}", part_dtype).to(device) for name in names}
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:  # lists missing, unexpected and misshapen tensors
            problems.append(f"{part}: {one_line(error)}")
    raise_problems(f"{path} does not fit its {CONFIG_FILE}", problems, LamError, _REMEDY)
    return wanted


# Which LAM made a token: a hash of everything that determines one, and of nothing else.


def fingerprint_of(path: str | Path, revision: str | None = None) -> str:
    """SHA-256 (hex) of a model's encoder and codebook tensors and of the dimensions that shape a token.

    The FDM, the description and training-only settings are not included. Computed once per process for each
    state of the two files.

    Raises:
        LamError: there is no such model, or a file of it cannot be read.
    """
    folder = resolve_lam(path, revision)
    family, config = _read_config(folder)
    with open_weights(folder) as weights:
        return _fingerprint(weights, folder / WEIGHTS_FILE, family, config)


def _fingerprint(weights: safe_open, path: Path, family: type[LatentActionModel], config: Any) -> str:
    dimensions = json.dumps(config.token_fields(family.architecture), sort_keys=True)
    status = path.stat()
    # The inode and its last change reveal a file that was replaced by one of the same size and time.
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known = (dimensions, *family.token_parts, *state)
    if known not in _fingerprints:
        _fingerprints[known] = _hash(weights, dimensions, family.token_parts)
    return _fingerprints[known]


def _hash(weights: safe_open, dimensions: str, token_parts: Sequence[str]) -> str:
    digest = hashlib.sha256(dimensions.encode())
    prefixes = tuple(f"{part}." for part in token_parts)
    keys = weights.keys()
    for key in sorted(key for key in keys if key.startswith(prefixes)):
        tensor = weights.get_tensor(key)
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# The weights file. It is read, not mapped: a process that maps a file is killed (SIGBUS) when another one
# shortens it.


def _finite(weights: safe_open, path: Path, key: str, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor as `dtype`; one NaN in it would be in every token."""
    stored = weights.get_tensor(key)
    if not stored.is_floating_point():
        raise LamError(
            f"{path} is damaged: {shown(key)} is stored as {stored.dtype}, expected floating point. {_REMEDY}"
        )
    tensor = stored.to(dtype)
    if not torch.isfinite(tensor).all():
        raise LamError(f"{path} is damaged: {shown(key)} holds NaN or Inf as {dtype}. {_REMEDY}")
    return tensor


@contextmanager
def open_weights(folder: Path) -> Iterator[safe_open]:
    """The weights of a model folder; the header is checked, tensors are read when they are asked for.

    Raises:
        LamError: absent, no safetensors file, or it became shorter inside the block.
    """
    path = folder / WEIGHTS_FILE
    try:
        check_regular(path)
        with safe_open(path, framework="pt", backend="pread") as weights:
            yield weights
    except (UnreadableError, SafetensorError, OSError, MemoryError) as error:
        raise LamError(
            f"{path} is not a readable safetensors file ({first_line(error)}), expected the weights beside "
            f"{CONFIG_FILE}. Fetch the model again; a file of some hundred bytes is a git-lfs pointer "
            "(`git lfs pull`)."
        ) from error
