"""Published UniVLA stage-2 checkpoints → our scheme: their keys, and what their shapes tell."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..converting import Dims, Shape, Shapes, Translation
from ..errors import LamError
from .config import UniVlaConfig
from .network import interpolated_positions, position_table

DIMS = ("image_size", "num_heads", "dino_num_heads")
"""Of `Dims`, what these checkpoints do not tell."""

WIDE = ("weight", "bias")
DINO_BLOCK = {
    "norm1": "norm1", "attn.qkv": "qkv", "attn.proj": "proj", "norm2": "norm2", "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}  # fmt: skip
NORMED = {"norm1": "norm1", "norm2": "norm2", "norm3": "norm3", "ffn.0": "mlp.0", "ffn.3": "mlp.2"}
ATTENTIONS = {"spatial_attn": "spatial", "temporal_attn": "temporal"}


def own_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors, by the names that upstream gives them."""
    return {key.replace("lam.", ""): value for key, value in state.items()}


def is_ours(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a LAM of UniVLA, of whichever stage."""
    keys = own_keys(state)
    return any(key.startswith("encoder.transformer_blocks.") for key in keys) and any(
        key.startswith(("dino_encoder.", "to_codebook", "text_encoder.")) for key in keys
    )


def translate(path: Path, state: Mapping[str, Tensor], dims: Dims, keep_fdm: bool) -> Translation:
    """Find out the dimensions of a stage-2 checkpoint.

    Raises:
        LamError: it is of stage 1, tensors that tell its dimensions are not there, or they describe no model.
    """
    if any(key.startswith("text_encoder.") for key in state) or "vq_action.codebook.weight" not in state:
        raise LamError(
            f"{path} has no vq_action.codebook.weight or has a text encoder, as UniVLA's stage 1 does, "
            "expected stage 2: stage 1 wants an instruction with every pair. Convert lam-stage-2.ckpt."
        )
    if keep_fdm:
        raise LamError(
            "UniVLA's FDM predicts DINOv2 features, not pictures, so there is nothing to keep it for, and "
            "--keep_fdm=true was given. Leave it out."
        )
    shapes = Shapes(path, state)
    defaults = UniVlaConfig()
    dino = "dino_encoder.patch_embed.proj.weight"
    config = UniVlaConfig(
        num_learned_tokens=shapes.size("action_latent", 2),
        action_latent_dim=shapes.size("vq_action.codebook.weight", 1),
        n_codes=shapes.size("vq_action.codebook.weight", 0),
        image_size=dims.image_size or defaults.image_size,
        model_dim=shapes.size("to_codebook.weight", 1),
        num_heads=dims.num_heads or defaults.num_heads,
        enc_blocks=shapes.depth("encoder.transformer_blocks"),
        irrelevant_codes=shapes.size("vq.codebook.weight", 0),
        dino_patch_size=shapes.size(dino, 2),
        dino_dim=shapes.size(dino, 0),
        dino_depth=shapes.depth("dino_encoder.blocks"),
        dino_num_heads=dims.dino_num_heads or defaults.dino_num_heads,
        dino_registers=shapes.size("dino_encoder.register_tokens", 1),
    )
    table = 1 + shapes.side("dino_encoder.pos_embed", 1) ** 2
    expected = _expected(config, table, shapes.depth("decoder.transformer_blocks"))
    return Translation(config, expected, lambda tensors: _state(config, tensors))


def _expected(c: UniVlaConfig, table: int, dec_blocks: int) -> dict[str, Shape]:
    d, D, a, n, P = c.dino_dim, c.model_dim, c.action_latent_dim, c.num_learned_tokens, c.dino_patch_size
    shapes: dict[str, Shape] = {
        "action_latent": (1, 1, n, d), "action_latent_controllable": (1, 1, n, d),
        "dino_encoder.cls_token": (1, 1, d), "dino_encoder.register_tokens": (1, c.dino_registers, d),
        "dino_encoder.mask_token": (1, d), "dino_encoder.pos_embed": (1, table, d),
        "dino_encoder.patch_embed.proj.weight": (d, 3, P, P), "dino_encoder.patch_embed.proj.bias": (d,),
        "vq_action.codebook.weight": (c.n_codes, a), "vq.codebook.weight": (c.irrelevant_codes, a),
    }  # fmt: skip

    def linear(key: str, inputs: int, outputs: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (outputs, inputs), (outputs,)

    def norm(key: str, width: int) -> None:
        shapes[f"{key}.weight"] = shapes[f"{key}.bias"] = (width,)

    def block(prefix: str, attentions: tuple[str, ...], norms: int) -> None:
        for attention in attentions:
            for name in ("to_q", "to_k", "to_v"):
                shapes[f"{prefix}.{attention}.{name}.weight"] = (D, D)
            linear(f"{prefix}.{attention}.to_out.0", D, D)
        for number in range(1, norms + 1):
            norm(f"{prefix}.norm{number}", D)
        linear(f"{prefix}.ffn.0", D, 4 * D)
        linear(f"{prefix}.ffn.3", 4 * D, D)

    for number in range(c.dino_depth):
        prefix = f"dino_encoder.blocks.{number}"
        norm(f"{prefix}.norm1", d)
        norm(f"{prefix}.norm2", d)
        shapes[f"{prefix}.ls1.gamma"] = shapes[f"{prefix}.ls2.gamma"] = (d,)
        linear(f"{prefix}.attn.qkv", d, 3 * d)
        linear(f"{prefix}.attn.proj", d, d)
        linear(f"{prefix}.mlp.fc1", d, 4 * d)
        linear(f"{prefix}.mlp.fc2", 4 * d, d)
    norm("dino_encoder.norm", d)
    for number in range(c.enc_blocks):
        block(f"encoder.transformer_blocks.{number}", ("spatial_attn", "temporal_attn"), 3)
    for number in range(dec_blocks):
        block(f"decoder.transformer_blocks.{number}", ("spatial_attn",), 2)
    for part, inputs in (("encoder", d), ("decoder", D)):
        norm(f"{part}.ffn.0", inputs)
        linear(f"{part}.ffn.1", inputs, D)
        norm(f"{part}.ffn.2", D)
    linear("to_codebook", D, a)
    linear("to_codebook_uncontrol", D, a)
    linear("patch_up", d, D)
    linear("action_up", a, D)
    linear("action_up_uncontrol", a, D)
    linear("decoder.out", D, d)
    return shapes


def _state(c: UniVlaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    latents = [tensors[name][0, 0] for name in ("action_latent_controllable", "action_latent")]
    state = {
        "encoder.latents": torch.cat(latents),
        "encoder.positions": position_table(c.num_latents + c.num_patches, c.model_dim),
        "encoder.dino.cls_token": tensors["dino_encoder.cls_token"],
        "encoder.dino.registers": tensors["dino_encoder.register_tokens"],
        "encoder.dino.positions": interpolated_positions(tensors["dino_encoder.pos_embed"], c.grid_size),
        "vq.embedding.weight": tensors["vq_action.codebook.weight"],
        "irrelevant.vq.embedding.weight": tensors["vq.codebook.weight"],
    }

    def copied(theirs: str, ours: str, kinds: tuple[str, ...] = WIDE) -> None:
        for kind in kinds:
            state[f"{ours}.{kind}"] = tensors[f"{theirs}.{kind}"]

    copied("dino_encoder.patch_embed.proj", "encoder.dino.patches")
    copied("dino_encoder.norm", "encoder.dino.norm")
    for number in range(c.dino_depth):
        old, new = f"dino_encoder.blocks.{number}", f"encoder.dino.blocks.{number}"
        for key, name in DINO_BLOCK.items():
            copied(f"{old}.{key}", f"{new}.{name}")
        for scale in ("1", "2"):
            state[f"{new}.scale{scale}"] = tensors[f"{old}.ls{scale}.gamma"]
    for number in range(3):
        copied(f"encoder.ffn.{number}", f"encoder.input.{number}")
    for number in range(c.enc_blocks):
        old, new = f"encoder.transformer_blocks.{number}", f"encoder.blocks.{number}"
        for key, name in NORMED.items():
            copied(f"{old}.{key}", f"{new}.{name}")
        for key, name in ATTENTIONS.items():
            for letter in "qkv":
                copied(f"{old}.{key}.to_{letter}", f"{new}.{name}.{letter}", ("weight",))
            copied(f"{old}.{key}.to_out.0", f"{new}.{name}.out")
    copied("to_codebook", "encoder.to_token")
    copied("to_codebook_uncontrol", "irrelevant.proj")
    return state
