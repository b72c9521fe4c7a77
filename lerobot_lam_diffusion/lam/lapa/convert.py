"""Published LAQ checkpoints → our scheme: their keys, and what their shapes reveal."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import Dims, Shapes, Translation
from .network import LapaConfig

DIMS = ("image_size", "code_seq_len")
"""Fields of `Dims` that these checkpoints do not contain."""

RULES = (
    (r"^encoder\.embed\.norm_in", "to_patch_emb_first_frame.1"),
    (r"^encoder\.embed\.proj", "to_patch_emb_first_frame.2"),
    (r"^encoder\.embed\.norm_out", "to_patch_emb_first_frame.3"),
    (r"^encoder\.latent\.proj", "vq.project_in"),
    (r"^encoder\.latent\.conv1", "vq.cnn_encoder.0"),
    (r"^encoder\.latent\.conv2", "vq.cnn_encoder.2"),
    (r"^vq\.embedding\.weight", "vq.codebooks"),
    (r"^decoder\.context", "vq.project_out"),
    (r"^decoder\.pixels", "to_pixels_first_frame.0"),
    (r"^encoder\.(spatial|temporal)\.norm", r"enc_\1_transformer.norm_out"),
    (r"^decoder\.blocks\.norm", "dec_spatial_transformer.norm_out"),
    (r"^encoder\.(spatial|temporal)\.blocks", r"enc_\1_transformer.layers"),
    (r"^decoder\.blocks\.blocks", "dec_spatial_transformer.layers"),
    # Inside a block.
    (r"\.peg\.", ".0.dsconv."),
    (r"\.attn\.", ".1."),
    (r"\.cross\.", ".2."),
    (r"\.ff\.norm\.", ".3.0."),
    (r"\.ff\.up\.", ".3.1."),
    (r"\.ff\.down\.", ".3.4."),
    (r"\.(q|kv|out)\.weight$", r".to_\1.weight"),
    # Their own norms, not torch's.
    (r"(\.[12]\.norm|\.context_norm|\.norm_out)\.weight$", r"\1.gamma"),
    (r"(\.[12]\.norm|\.context_norm|\.norm_out)\.bias$", r"\1.beta"),
)

BIAS = "spatial_rel_pos_bias.net"

# Self-attention has the parameters of attention to a context, and does not use them.
UNUSED = r"(enc|dec)_(spatial|temporal)_transformer\.layers\.\d+\.1\.(context_norm\.(gamma|beta)|null_kv)"


def is_ours(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a LAQ."""
    return any(key.startswith(("enc_spatial_transformer.", "to_patch_emb_first_frame.")) for key in state)


def translate(path: Path, state: Mapping[str, Tensor], dims: Dims, keep_fdm: bool) -> Translation:
    """Find out the dimensions of a LAQ checkpoint.

    Raises:
        LamError: tensors that give them are missing, or they describe no model.
    """
    shapes = Shapes(path, state)
    first = "enc_spatial_transformer.layers.0"
    defaults = LapaConfig()
    config = LapaConfig(
        num_learned_tokens=dims.code_seq_len or defaults.num_learned_tokens,
        action_latent_dim=shapes.size("vq.codebooks", 1),
        n_codes=shapes.size("vq.codebooks", 0),
        image_size=dims.image_size or defaults.image_size,
        patch_size=shapes.side("to_patch_emb_first_frame.2.weight", 1, per_place=3),
        dim=shapes.size("to_patch_emb_first_frame.2.weight", 0),
        spatial_depth=shapes.depth("enc_spatial_transformer.layers"),
        temporal_depth=shapes.depth("enc_temporal_transformer.layers"),
        heads=shapes.size(f"{BIAS}.2.weight", 0),
        dim_head=shapes.size(f"{first}.1.q_scale", 0),
        ff_dim=shapes.size(f"{first}.3.4.weight", 1),
    )
    return translation_of(config, keep_fdm)


def translation_of(config: LapaConfig, keep_fdm: bool = False) -> Translation:
    """The translation of a LAQ of these dimensions."""
    computed = {"encoder.bias": partial(relative_bias, config)}
    D = config.dim
    inputs = {
        f"{BIAS}.0.0.weight": (D, 2), f"{BIAS}.0.0.bias": (D,),
        f"{BIAS}.1.0.weight": (D, D), f"{BIAS}.1.0.bias": (D,),
        f"{BIAS}.2.weight": (config.heads, D), f"{BIAS}.2.bias": (config.heads,),
    }  # fmt: skip
    return Translation(config, RULES, computed, inputs, UNUSED, () if keep_fdm else ("decoder",))


@torch.no_grad()
def relative_bias(c: LapaConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """Attention bias (h, N, N) of the relative positions of two patches, by a small network."""

    def linear(x: Tensor, layer: str) -> Tensor:
        weight, bias = (tensors[f"{BIAS}.{layer}.{kind}"].float() for kind in ("weight", "bias"))
        return F.linear(x, weight, bias)

    places = torch.arange(c.num_patches)
    at = torch.stack([places // c.grid_size, places % c.grid_size], dim=1).float()  # (N, 2): row, column
    apart = at.unsqueeze(1) - at.unsqueeze(0)
    x = apart.sign() * (apart.abs() + 1).log()
    for layer in ("0.0", "1.0"):
        x = F.leaky_relu(linear(x, layer), 0.1)
    return linear(x, "2").permute(2, 0, 1)
