"""Adapter for a golden-vector checker: `check_parity.py --adapter tests/lam/univla_adapter.py --golden …`.

A model folder holds `lam-stage-2.ckpt`, as published, and `lam_config.json`, what it does not tell; it is
converted first.
"""

import json
import tempfile
from pathlib import Path

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.lam.convert import Source, convert_lam
from lerobot_lam_diffusion.lam.converting import Dims


def load_model(directory):
    told = json.loads((Path(directory) / "lam_config.json").read_text())
    dims = Dims(
        image_size=told["resolution"], num_heads=told["num_heads"], dino_num_heads=told["dino"]["heads"]
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Source(Path(directory) / "lam-stage-2.ckpt")
        return load_lam(convert_lam(source, Path(folder) / "lam", dims=dims))


def encode_pairs(model, prev, cur):
    return model.encode_pairs(prev, cur)


def encode_irrelevant(model, prev, cur):
    return model.encode_irrelevant(prev, cur)


def preprocess(model, frames):
    return model.preprocess(frames)


def debug(model, prev, cur):
    encoder, seen = model.encoder, {}
    dino = encoder.dino
    hooked = {"dino.patch_embed": dino.patches, "dino.norm": dino.norm, "enc.ffn": encoder.input}
    hooked |= {f"dino.block{number}": block for number, block in enumerate(dino.blocks)}
    for number, block in enumerate(encoder.blocks):
        parts = {
            "spatial_attn": block.spatial,
            "temporal_attn": block.temporal,
            "ffn": block.mlp,
            "out": block,
        }
        hooked |= {f"enc{number}.{part}": module for part, module in parts.items()}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
        for name, module in hooked.items()
    ]
    model.encode_pairs(prev, cur)
    for handle in handles:
        handle.remove()
    seen["dino.patch_embed"] = seen["dino.patch_embed"].flatten(2).transpose(1, 2)
    seen["enc.ffn"] = seen["enc.ffn"].unflatten(0, (1, 2))
    for number in range(len(encoder.blocks)):
        seen[f"enc{number}.temporal_attn"] = seen[f"enc{number}.temporal_attn"][0].transpose(0, 1)
    return {**seen, "enc.pos": seen["enc.ffn"] + encoder.positions, "dino.pos": dino.positions}
