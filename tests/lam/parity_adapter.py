"""Adapter for a golden-vector checker: `check_parity.py --adapter tests/lam/parity_adapter.py --golden …`."""

import torch

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.lam.villa_x.layers import spatial_table, temporal_table


def load_model(directory):
    return load_lam(directory, fdm=True)


def encode_pairs(model, prev, cur):
    return model.encode_pairs(prev, cur)


def encode_clip(model, clip):
    return model.encode_clip(clip)


def preprocess(model, frames):
    return model.preprocess(frames)


def decode(model, frames, la):
    latents = torch.as_tensor(la).flatten(1)
    return model.predict_patches(frames, latents), model.predict_next(frames, latents)


def tables(model):
    config = model.config
    return {
        "pe_spatial": spatial_table(config.grid_size, config.encoder_embed_dim),
        "pe_temporal": temporal_table(config.d_t, config.encoder_embed_dim),
        "decoder_pe": spatial_table(config.grid_size, config.decoder_embed_dim),
    }
