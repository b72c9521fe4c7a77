"""Adapter for a golden-vector checker: `check_parity.py --adapter tests/lam/lapa_adapter.py --golden …`.

A model folder holds `laq.pt`, as published, and `laq_config.json`, what it does not tell; it is converted
first.
"""

import json
import tempfile
from pathlib import Path

import torch

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.lam.convert import Source, convert_lam
from lerobot_lam_diffusion.lam.converting import Dims


def load_model(directory):
    told = json.loads((Path(directory) / "laq_config.json").read_text())
    dims = Dims(image_size=told["image_size"], code_seq_len=told["code_seq_len"])
    with tempfile.TemporaryDirectory() as folder:
        source = Source(Path(directory) / "laq.pt")
        return load_lam(convert_lam(source, Path(folder) / "lam", dims=dims, keep_fdm=True), fdm=True)


def encode_pairs(model, prev, cur):
    return model.encode_pairs(prev, cur)


def preprocess(model, frames):
    return model.preprocess(frames)


def decode(model, frames, la):
    return model.predict_pixels(frames, torch.as_tensor(la).flatten(1))


def debug(model, prev, cur):
    encoder, seen = model.encoder, {}
    hooked = {"patch_embed": encoder.embed, "spatial.out": encoder.spatial, "temporal.out": encoder.temporal}
    for name, transformer in (("spatial", encoder.spatial), ("temporal", encoder.temporal)):
        for number, block in enumerate(transformer.blocks):
            parts = {"peg": block.peg, "attn": block.attn, "ff": block.ff}
            hooked |= {f"{name}{number}.{part}": module for part, module in parts.items()}
    hooked["grids"] = encoder.latent
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
        for name, module in hooked.items()
    ]
    model.encode_pairs(prev, cur)
    for handle in handles:
        handle.remove()
    first, last = seen.pop("grids")[0]
    return {**seen, "bias": encoder.bias, "grid_first": first, "grid_last": last}
