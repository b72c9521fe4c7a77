from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lerobot_lam_diffusion.lam import LamConfig, save_lam
from lerobot_lam_diffusion.lam.quantizer import Quantizer
from lerobot_lam_diffusion.lam.villa_x.decoder import Decoder
from lerobot_lam_diffusion.lam.villa_x.encoder import Encoder

DATA = Path(__file__).parent / "data"

TINY = LamConfig(
    resolution=16, patch_size=4, d_t=3, mlp_ratio=1.3, encoder_depth=2, encoder_embed_dim=24,
    encoder_n_heads=2, action_latent_dim=5, st_use_qk_norm=False, num_learned_tokens=3, map_heads=4,
    decoder_depth=1, decoder_embed_dim=16, decoder_n_heads=2, use_qk_norm=True, n_codes=7,
)  # fmt: skip


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Outputs of the original villa-X package for a random model; see the .json beside it."""
    return load_file(DATA / "golden_public.safetensors")


@pytest.fixture
def tiny_config() -> LamConfig:
    return TINY


@pytest.fixture
def make_lam_folder(tmp_path):
    """Writes the model folder of a random LAM; keyword arguments change the tiny config."""

    def make(name: str = "lam", seed: int = 0, description: str = "", **changes) -> Path:
        config = replace(TINY, **changes)
        torch.manual_seed(seed)
        parts = Encoder(config), Quantizer(config), Decoder(config)
        return save_lam(tmp_path / name, config, *parts, description=description)

    return make


@pytest.fixture
def lam_folder(make_lam_folder) -> Path:
    return make_lam_folder()


@pytest.fixture
def make_frames():
    """Random uint8 frames of the given shape."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return make
