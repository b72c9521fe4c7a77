"""Published LAQ checkpoints → our scheme: their keys, and what their shapes tell."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..converting import Dims, Shape, Shapes, Translation
from .config import LapaConfig
from .network import HEADS, NULL_PAIRS

ENCODERS = {"enc_spatial_transformer": "encoder.spatial", "enc_temporal_transformer": "encoder.temporal"}
DECODER = {"dec_spatial_transformer": "decoder.blocks"}
BLOCK = {
    "0.dsconv.weight": "peg.weight", "0.dsconv.bias": "peg.bias",
    "3.0.weight": "ff.norm.weight", "3.0.bias": "ff.norm.bias",
    "3.1.weight": "ff.up.weight", "3.4.weight": "ff.down.weight",
}  # fmt: skip
ATTENTION = {
    "norm.gamma": "norm.weight", "norm.beta": "norm.bias", "to_q.weight": "q.weight",
    "to_kv.weight": "kv.weight", "to_out.weight": "out.weight", "q_scale": "q_scale", "k_scale": "k_scale",
}  # fmt: skip
CONTEXT = {"context_norm.gamma": "context_norm.weight", "context_norm.beta": "context_norm.bias"}


def is_ours(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a LAQ."""
    return any(key.startswith(("enc_spatial_transformer.", "to_patch_emb_first_frame.")) for key in state)


def translate(path: Path, state: Mapping[str, Tensor], dims: Dims, keep_fdm: bool) -> Translation:
    """Find out the dimensions of a LAQ checkpoint.

    Raises:
        LamError: tensors that tell them are not there, or they describe no model.
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
        heads=shapes.size("spatial_rel_pos_bias.net.2.weight", 0),
        dim_head=shapes.size(f"{first}.1.q_scale", 0),
        ff_dim=shapes.size(f"{first}.3.4.weight", 1),
    )
    return Translation(config, _expected(config), lambda tensors: _state(config, tensors, keep_fdm))


def _expected(c: LapaConfig) -> dict[str, Shape]:
    D, a, inner, pixels = c.dim, c.action_latent_dim, c.heads * c.dim_head, c.patch_values
    shapes: dict[str, Shape] = {
        "spatial_rel_pos_bias.net.0.0.weight": (D, 2), "spatial_rel_pos_bias.net.0.0.bias": (D,),
        "spatial_rel_pos_bias.net.1.0.weight": (D, D), "spatial_rel_pos_bias.net.1.0.bias": (D,),
        "spatial_rel_pos_bias.net.2.weight": (c.heads, D), "spatial_rel_pos_bias.net.2.bias": (c.heads,),
        "to_patch_emb_first_frame.1.weight": (pixels,), "to_patch_emb_first_frame.1.bias": (pixels,),
        "to_patch_emb_first_frame.2.weight": (D, pixels), "to_patch_emb_first_frame.2.bias": (D,),
        "to_patch_emb_first_frame.3.weight": (D,), "to_patch_emb_first_frame.3.bias": (D,),
        "vq.codebooks": (c.n_codes, a),
        "vq.project_in.weight": (a, D), "vq.project_in.bias": (a,),
        "vq.project_out.weight": (D, a), "vq.project_out.bias": (D,),
        "to_pixels_first_frame.0.weight": (pixels, D), "to_pixels_first_frame.0.bias": (pixels,),
    }  # fmt: skip
    first, second = HEADS[c.num_learned_tokens]
    kernels = {0: first} if second is None else {0: first, 2: second[0]}
    for number, kernel in kernels.items():
        shapes[f"vq.cnn_encoder.{number}.weight"] = (a, a, *kernel)
        shapes[f"vq.cnn_encoder.{number}.bias"] = (a,)

    def attention(prefix: str, nulls: int) -> None:
        for name in ("norm.gamma", "norm.beta", "context_norm.gamma", "context_norm.beta"):
            shapes[f"{prefix}.{name}"] = (D,)
        shapes[f"{prefix}.null_kv"] = (c.heads, nulls, c.dim_head)
        shapes[f"{prefix}.to_q.weight"] = (inner, D)
        shapes[f"{prefix}.to_kv.weight"] = (2 * inner, D)
        shapes[f"{prefix}.to_out.weight"] = (D, inner)
        shapes[f"{prefix}.q_scale"] = shapes[f"{prefix}.k_scale"] = (c.dim_head,)

    for name in (*ENCODERS, *DECODER):
        for block in range(c.temporal_depth if "temporal" in name else c.spatial_depth):
            prefix = f"{name}.layers.{block}"
            shapes[f"{prefix}.0.dsconv.weight"] = (D, 1, 3, 3, 3)
            shapes[f"{prefix}.0.dsconv.bias"] = (D,)
            attention(f"{prefix}.1", 0)
            if name in DECODER:
                attention(f"{prefix}.2", 2 * NULL_PAIRS)
            shapes[f"{prefix}.3.0.weight"] = shapes[f"{prefix}.3.0.bias"] = (D,)
            shapes[f"{prefix}.3.1.weight"] = (2 * c.ff_dim, D)
            shapes[f"{prefix}.3.4.weight"] = (D, c.ff_dim)
        shapes[f"{name}.norm_out.gamma"] = shapes[f"{name}.norm_out.beta"] = (D,)
    return shapes


def _state(c: LapaConfig, tensors: Mapping[str, Tensor], keep_fdm: bool) -> dict[str, Tensor]:
    state = {
        "encoder.embed.norm_in.weight": tensors["to_patch_emb_first_frame.1.weight"],
        "encoder.embed.norm_in.bias": tensors["to_patch_emb_first_frame.1.bias"],
        "encoder.embed.proj.weight": tensors["to_patch_emb_first_frame.2.weight"],
        "encoder.embed.proj.bias": tensors["to_patch_emb_first_frame.2.bias"],
        "encoder.embed.norm_out.weight": tensors["to_patch_emb_first_frame.3.weight"],
        "encoder.embed.norm_out.bias": tensors["to_patch_emb_first_frame.3.bias"],
        "encoder.bias": relative_bias(c, tensors),
        "encoder.latent.proj.weight": tensors["vq.project_in.weight"],
        "encoder.latent.proj.bias": tensors["vq.project_in.bias"],
        "vq.embedding.weight": tensors["vq.codebooks"],
    }
    for number, name in ((0, "conv1"), (2, "conv2")):
        for kind in ("weight", "bias"):
            if f"vq.cnn_encoder.{number}.{kind}" in tensors:
                state[f"encoder.latent.{name}.{kind}"] = tensors[f"vq.cnn_encoder.{number}.{kind}"]
    for theirs, ours in (ENCODERS | DECODER if keep_fdm else ENCODERS).items():
        blocks = c.temporal_depth if "temporal" in theirs else c.spatial_depth
        for block in range(blocks):
            old, new = f"{theirs}.layers.{block}", f"{ours}.blocks.{block}"
            state |= {f"{new}.{name}": tensors[f"{old}.{key}"] for key, name in BLOCK.items()}
            state |= {f"{new}.attn.{name}": tensors[f"{old}.1.{key}"] for key, name in ATTENTION.items()}
            if theirs in DECODER:
                cross = ATTENTION | CONTEXT | {"null_kv": "null_kv"}
                state |= {f"{new}.cross.{name}": tensors[f"{old}.2.{key}"] for key, name in cross.items()}
        state[f"{ours}.norm.weight"] = tensors[f"{theirs}.norm_out.gamma"]
        state[f"{ours}.norm.bias"] = tensors[f"{theirs}.norm_out.beta"]
    if keep_fdm:
        state |= {
            "decoder.context.weight": tensors["vq.project_out.weight"],
            "decoder.context.bias": tensors["vq.project_out.bias"],
            "decoder.pixels.weight": tensors["to_pixels_first_frame.0.weight"],
            "decoder.pixels.bias": tensors["to_pixels_first_frame.0.bias"],
        }
    return state


@torch.no_grad()
def relative_bias(c: LapaConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """Attention bias (h, N, N) of the relative positions of two patches, by a small network."""
    net = {
        name: tensors[f"spatial_rel_pos_bias.net.{name}"].float()
        for name in ("0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias", "2.weight", "2.bias")
    }
    places = torch.arange(c.num_patches)
    at = torch.stack([places // c.grid_size, places % c.grid_size], dim=1).float()  # (N, 2): row, column
    apart = at.unsqueeze(1) - at.unsqueeze(0)
    x = apart.sign() * (apart.abs() + 1).log()
    for layer in ("0.0", "1.0"):
        x = F.leaky_relu(F.linear(x, net[f"{layer}.weight"], net[f"{layer}.bias"]), 0.1)
    return F.linear(x, net["2.weight"], net["2.bias"]).permute(2, 0, 1)


DIMS = ("image_size", "code_seq_len")
"""Of `Dims`, what these checkpoints do not tell."""


def own_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors, by the names that upstream gives them."""
    return dict(state)
