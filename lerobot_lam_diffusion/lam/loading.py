"""Open and write model folders: `model_config.json` + `model.safetensors`, strict on keys and shapes."""

import os
import re
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lerobot_lam_diffusion.reading import shown

from .base import LatentActionModel
from .config import CONFIG_FILE, config_document, read_document
from .errors import LamError, problems_to_error
from .fingerprint import fingerprint_of_weights
from .locating import WEIGHTS_FILE, locate_lam, resolve_lam
from .weights import Weights, open_weights

FAMILIES = {
    "IgorModel": "lerobot_lam_diffusion.lam.villa_x:VillaXLam",
    "LapaLaq": "lerobot_lam_diffusion.lam.lapa:LapaLam",
    "UniVlaLam": "lerobot_lam_diffusion.lam.univla:UniVlaLam",
}
"""Architecture in `model_config.json` → the family's class, imported when such a folder is opened."""

ENTRY_POINTS = "lerobot_lam_diffusion.lams"
"""Group in which an installed package names families of its own, `architecture = "module:Class"`."""

_registered: dict[str, type[LatentActionModel]] = {}
_DTYPES = (torch.float32, torch.bfloat16)
_STORED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOST_TOLD = 30
_REMEDY = "Fetch or write the model folder again: weights and config must belong together."


def register_lam[Family: type[LatentActionModel]](family: Family) -> Family:
    """Class decorator: `load_lam` opens folders of this family's `architecture` from now on.

    Raises:
        LamError: if the name is taken.
    """
    name = family.architecture
    taken = FAMILIES.get(name) or _registered.get(name)
    if (
        taken is not None
        and taken is not family
        and getattr(taken, "__qualname__", "") != family.__qualname__
    ):
        raise LamError(
            f"The architecture {name!r} of {family.__qualname__} is taken by {shown(taken)}. Choose another."
        )
    _registered[name] = family
    return family


def family_of(folder: Path, architecture: Any) -> type[LatentActionModel]:
    """The class that opens folders of this architecture.

    Raises:
        LamError: if there is none.
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
    """The dimensions of a model folder's LAM, at least a `TokenShape`; no weights are read.

    Raises:
        LamError: if the file is absent, of an unknown architecture or not a possible model.
    """
    return _read_config(folder)[1]


def _read_config(folder: Path) -> tuple[type[LatentActionModel], Any]:
    document = read_document(folder)
    family = family_of(folder, document.get("architecture"))
    try:
        return family, family.config_class.from_dict(document.get("config", {}))
    except LamError as error:
        raise LamError(f"{folder / CONFIG_FILE}: {error}") from None


def fingerprint_of(path: str | Path, revision: str | None = None) -> str:
    """SHA-256 (hex) of a model's encoder and codebook tensors and of the dimensions that shape a token.

    The FDM, the description and training-only settings do not enter. Computed once in a process for each
    state of the two files.

    Raises:
        LamError: if there is no such model, or a file of it cannot be read.
    """
    folder = resolve_lam(path, revision)
    family, config = _read_config(folder)
    with open_weights(folder) as weights:
        return _fingerprint(weights, family, config)


def _fingerprint(weights: Weights, family: type[LatentActionModel], config: Any) -> str:
    return fingerprint_of_weights(weights, config.token_fields(family.architecture), family.token_parts)


def load_lam(
    path: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fdm: bool = False,
) -> LatentActionModel:
    """Open a latent action model, frozen and ready to encode.

    Its family and every dimension come from the folder's `model_config.json`. Keys and shapes of the whole
    weights file are checked; what makes tokens alone is read unless `fdm` is set.

    Args:
        path: model folder (or one with it as `lam/`), a shipped name such as `pusht-compact`, or a Hub id.
        revision: branch, tag or commit, for a Hub id.
        device: where the model computes.
        dtype: arithmetic of the networks, torch.float32 or torch.bfloat16; the quantiser stays in float32.
        fdm: also load the decoder, for `predict_next`.

    Raises:
        LamError: if the model cannot be found or opened; all problems of its weights at once.
    """
    if dtype not in _DTYPES:
        raise LamError(f"The LAM's dtype is {dtype}, expected torch.float32 or torch.bfloat16. Choose one.")
    folder, commit = locate_lam(path, revision)
    family, config = _read_config(folder)
    with open_weights(folder) as weights:
        _check_blocks(weights, family, config)
        modules = _meta_modules(family, config)
        _drop_absent_fdm(folder, weights, family, modules, fdm)
        _check_weights(weights, modules)
        fingerprint = _fingerprint(weights, family, config)
        loaded = {name: module for name, module in modules.items() if fdm or name not in family.fdm_parts}
        for part, module in loaded.items():
            part_dtype = torch.float32 if part == "vq" else dtype
            names = module.state_dict()
            state = {name: _finite(weights, f"{part}.{name}", part_dtype).to(device) for name in names}
            module.load_state_dict(state, assign=True)
    return family(
        config, loaded, path=folder, revision=commit, fingerprint=fingerprint, dtype=dtype, device=device
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
) -> Path:
    """Write a villa-X model folder that `load_lam` (and the villa-X code) opens; each file appears whole.

    Returns:
        The folder.
    """
    from .villa_x import VillaXLam

    modules = {"encoder": encoder, "vq": vq, "decoder": decoder}
    state = {
        f"{part}.{name}": tensor
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
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
    """Write a model folder of any family; each of its two files appears whole.

    Args:
        folder: Made if it is not there.
        family: Whose `architecture` opens it again.
        config: Of the family's `config_class`.
        state: Key in `model.safetensors` (`part.name`) → tensor; kept as float32. May be empty.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in state.items()}
    partial = folder / f".{WEIGHTS_FILE}.partial"
    partial.write_bytes(save(tensors))  # `save_file` makes private files
    os.replace(partial, folder / WEIGHTS_FILE)
    partial = folder / f".{CONFIG_FILE}.partial"
    document = config_document(family.architecture, config.to_dict(), description, version)
    partial.write_text(document, encoding="utf-8")
    os.replace(partial, folder / CONFIG_FILE)
    return folder


def _meta_modules(family: type[LatentActionModel], config: Any) -> dict[str, nn.Module]:
    """The modules without memory behind their weights."""
    with torch.device("meta"):
        return family.build_modules(config)


def _drop_absent_fdm(
    folder: Path, weights: Weights, family: type[LatentActionModel], modules: dict[str, nn.Module], fdm: bool
) -> None:
    """Leave out the modules that predict frames, where the folder was written without them."""
    for part in family.fdm_parts if family.fdm_is_optional else ():
        if not any(key.startswith(f"{part}.") for key in weights.entries):
            del modules[part]
            if fdm:
                raise LamError(
                    f"{folder} holds no FDM, expected one for predicting frames. Convert the original "
                    "checkpoint again with lerobot-lam-convert … --keep_fdm=true."
                )


def _finite(weights: Weights, key: str, dtype: torch.dtype) -> Tensor:
    """A tensor of the file as `dtype`: one NaN in it would be in every token."""
    tensor = weights.tensor(key).to(dtype)
    if not torch.isfinite(tensor).all():
        raise LamError(f"{weights.path} is damaged: {key} holds NaN or Inf as {dtype}. {_REMEDY}")
    return tensor


def _check_blocks(weights: Weights, family: type[LatentActionModel], config: Any) -> None:
    """Compare the numbers of blocks before any is built: a damaged config may ask for very many."""
    problems = []
    for prefix, depth in family.expected_blocks(config).items():
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        blocks = {match[1] for key in weights.entries if (match := pattern.match(key))}
        absent = prefix.split(".")[0] in family.fdm_parts and family.fdm_is_optional and not blocks
        if len(blocks) != depth and not absent:
            problems.append(
                f"{prefix} has {depth} blocks by the config, but the weights hold {len(blocks)} blocks"
            )
    if problems:
        raise problems_to_error(f"{weights.path} does not fit its {CONFIG_FILE}", problems, _REMEDY)


def _check_weights(weights: Weights, modules: dict[str, nn.Module]) -> None:
    """Compare the file's header with the modules' keys and shapes; no tensor is read."""
    found = {key: list(entry.shape) for key, entry in weights.entries.items()}
    expected = {
        f"{part}.{name}": list(tensor.shape)
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    problems = [
        f"missing key {key}, expected with shape {expected[key]}" for key in expected if key not in found
    ]
    unexpected = sorted(found.keys() - expected.keys())
    problems += [
        f"unexpected key {shown(key)} of shape {shown(found[key])}" for key in unexpected[:_MOST_TOLD]
    ]
    if len(unexpected) > _MOST_TOLD:
        problems.append(f"… and {len(unexpected) - _MOST_TOLD} more unexpected keys")
    for key in expected.keys() & found.keys():
        if found[key] != expected[key]:
            problems.append(f"{key} has shape {shown(found[key])}, expected {expected[key]}")
        if weights.entries[key].dtype not in _STORED_DTYPES:
            problems.append(f"{key} is stored as {weights.entries[key].dtype}, expected floating point")
    if problems:
        raise problems_to_error(
            f"{weights.path} does not fit its {CONFIG_FILE}", _shortened(problems), _REMEDY
        )


def _shortened(problems: list[str], limit: int = _MOST_TOLD) -> list[str]:
    rest = len(problems) - limit
    return problems if rest <= 0 else [*problems[:limit], f"… and {rest} more"]
