"""Published UniVLA stage-2 checkpoints → our scheme: their keys, and what their shapes reveal."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lerobot_lam_diffusion.utils.errors import LamError

from ..checkpoint import Dims, Shapes, Translation
from .network import UniVlaConfig, interpolated_positions, position_table

DIMS = ("image_size", "num_heads", "dino_num_heads")
"""Fields of `Dims` that these checkpoints do not contain."""

RULES = (
    (r"^encoder\.dino\.patches", "dino_encoder.patch_embed.proj"),
    (r"^encoder\.dino\.registers", "dino_encoder.register_tokens"),
    (r"^encoder\.dino\.", "dino_encoder."),
    (r"^(dino_encoder\.blocks\.\d+)\.(qkv|proj)", r"\1.attn.\2"),
    (r"^(dino_encoder\.blocks\.\d+)\.(fc[12])", r"\1.mlp.\2"),
    (r"^(dino_encoder\.blocks\.\d+)\.scale([12])", r"\1.ls\2.gamma"),
    (r"^encoder\.input", "encoder.ffn"),
    (r"^encoder\.to_token", "to_codebook"),
    (r"^irrelevant\.proj", "to_codebook_uncontrol"),
    (r"^irrelevant\.vq\.embedding", "vq.codebook"),
    (r"^vq\.embedding", "vq_action.codebook"),
    (r"^encoder\.blocks", "encoder.transformer_blocks"),
    (r"\.(spatial|temporal)\.([qkv])\.", r".\1_attn.to_\2."),
    (r"\.(spatial|temporal)\.out\.", r".\1_attn.to_out.0."),
    (r"\.mlp\.0\.", ".ffn.0."),
    (r"\.mlp\.2\.", ".ffn.3."),
)


UNUSED = r"dino_encoder\.mask_token|(patch_up|action_up|action_up_uncontrol|decoder)\..+"  # the FDM


def is_ours(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a LAM of UniVLA, of whichever stage."""
    return any(key.startswith("encoder.transformer_blocks.") for key in state) and any(
        key.startswith(("dino_encoder.", "to_codebook", "text_encoder.")) for key in state
    )


def translate(path: Path, state: Mapping[str, Tensor], dims: Dims, keep_fdm: bool) -> Translation:
    """Find out the dimensions of a stage-2 checkpoint.

    Raises:
        LamError: it is of stage 1, tensors that give its dimensions are missing, or they describe no model.
    """
    if any(key.startswith("text_encoder.") for key in state) or "vq_action.codebook.weight" not in state:
        raise LamError(
            f"{path} has no vq_action.codebook.weight or has a text encoder, as UniVLA's stage 1 does, "
            "expected stage 2: stage 1 needs an instruction with every pair. Convert lam-stage-2.ckpt."
        )
    if keep_fdm:
        raise LamError(
            "UniVLA's FDM predicts DINOv2 features, not images, so there is nothing to keep it for, and "
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
    return translation_of(config, 1 + shapes.side("dino_encoder.pos_embed", 1) ** 2)


def translation_of(config: UniVlaConfig, positions: int = 1 + 37**2) -> Translation:
    """The translation of a LAM of these dimensions, whose DINOv2 has a table of so many positions."""
    c = config
    computed = {
        "encoder.latents": _latents,
        "encoder.positions": lambda _tensors: position_table(c.num_latents + c.num_patches, c.model_dim),
        "encoder.dino.positions": lambda tensors: interpolated_positions(
            tensors["dino_encoder.pos_embed"], c.grid_size
        ),
    }
    latents = (1, 1, c.num_learned_tokens, c.dino_dim)
    inputs = {
        "action_latent": latents,
        "action_latent_controllable": latents,
        "dino_encoder.pos_embed": (1, positions, c.dino_dim),
    }
    return Translation(c, RULES, computed, inputs, UNUSED)


def _latents(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name][0, 0] for name in ("action_latent_controllable", "action_latent")])
