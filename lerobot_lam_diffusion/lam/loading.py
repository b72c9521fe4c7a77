"""Open and write model folders: `model_config.json` + `model.safetensors`, strict on keys and shapes."""

import os
import re
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lerobot_lam_diffusion.reading import shown

from .config import CONFIG_FILE, LamConfig, config_document, read_config
from .decoder import Decoder
from .encoder import Encoder
from .errors import LamError, problems_to_error
from .fingerprint import fingerprint_of_weights
from .locating import WEIGHTS_FILE, locate_lam
from .quantizer import Quantizer
from .villa_x import LatentActionModel
from .weights import Weights, open_weights

_PARTS: dict[str, type[Encoder] | type[Quantizer] | type[Decoder]] = {
    "encoder": Encoder,
    "vq": Quantizer,
    "decoder": Decoder,
}
_DTYPES = (torch.float32, torch.bfloat16)
_STORED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOST_TOLD = 30
_REMEDY = "Fetch or write the model folder again: weights and config must belong together."


def load_lam(
    path: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fdm: bool = False,
) -> LatentActionModel:
    """Open a latent action model, frozen and ready to encode.

    Every dimension comes from the folder's `model_config.json`. Keys and shapes of the whole weights file
    are checked; encoder and codebook alone are read unless `fdm` is set.

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
    config = read_config(folder)
    with open_weights(folder) as weights:
        _check_depths(weights, config)
        modules = _meta_modules(config)
        _check_weights(weights, modules)
        fingerprint = fingerprint_of_weights(weights, config)
        for part in ("encoder", "vq", "decoder") if fdm else ("encoder", "vq"):
            part_dtype = torch.float32 if part == "vq" else dtype
            names = modules[part].state_dict()
            state = {name: _finite(weights, f"{part}.{name}", part_dtype).to(device) for name in names}
            modules[part].load_state_dict(state, assign=True)
    encoder, vq, decoder = modules["encoder"], modules["vq"], modules["decoder"] if fdm else None
    assert isinstance(encoder, Encoder)
    assert isinstance(vq, Quantizer)
    assert decoder is None or isinstance(decoder, Decoder)
    return LatentActionModel(
        config, encoder, vq, decoder, path=folder, revision=commit, fingerprint=fingerprint
    )


def save_lam(
    folder: str | Path,
    config: LamConfig,
    encoder: Encoder,
    vq: Quantizer,
    decoder: Decoder,
    *,
    description: str = "",
    version: int = 0,
) -> Path:
    """Write a model folder that `load_lam` (and the villa-X code) opens; each file appears whole.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules: dict[str, nn.Module] = {"encoder": encoder, "vq": vq, "decoder": decoder}
    state: dict[str, Tensor] = {
        f"{part}.{name}": tensor.detach().float().cpu().contiguous()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    partial = folder / f".{WEIGHTS_FILE}.partial"
    partial.write_bytes(save(state))
    os.replace(partial, folder / WEIGHTS_FILE)
    partial = folder / f".{CONFIG_FILE}.partial"
    partial.write_text(config_document(config, description, version), encoding="utf-8")
    os.replace(partial, folder / CONFIG_FILE)
    return folder


def _meta_modules(config: LamConfig) -> dict[str, nn.Module]:
    """The three modules without memory behind their weights."""
    with torch.device("meta"):
        return {name: part(config) for name, part in _PARTS.items()}


def _finite(weights: Weights, key: str, dtype: torch.dtype) -> Tensor:
    """A tensor of the file as `dtype`: one NaN in it would be in every token."""
    tensor = weights.tensor(key).to(dtype)
    if not torch.isfinite(tensor).all():
        raise LamError(f"{weights.path} is damaged: {key} holds NaN or Inf as {dtype}. {_REMEDY}")
    return tensor


def _check_depths(weights: Weights, config: LamConfig) -> None:
    """Compare the numbers of blocks before any is built: a damaged config may ask for very many."""
    depths = {"encoder": config.encoder_depth, "decoder": config.decoder_depth}
    problems = []
    for part, depth in depths.items():
        blocks = {
            match[1] for key in weights.entries if (match := re.match(rf"{part}\.layers\.(\d+)\.", key))
        }
        if len(blocks) != depth:
            problems.append(f"{part}_depth is {depth}, but the weights hold {len(blocks)} blocks")
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
