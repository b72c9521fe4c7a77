import json
from dataclasses import replace

import pytest

from lerobot_lam_diffusion.lam import LamConfig, write_lam
from lerobot_lam_diffusion.lam.loading import meta_modules, read_config
from lerobot_lam_diffusion.lam.villa_x import VillaXLam
from lerobot_lam_diffusion.utils.errors import LamError

from .conftest import DATA, TINY


def formula(c: LamConfig) -> dict[str, int]:
    """Parameter counts written down from the specification, not from the modules."""
    N, P, n, a = (c.resolution // c.patch_size) ** 2, c.patch_size, c.num_learned_tokens, c.action_latent_dim
    D, L, M, e = c.encoder_embed_dim, c.encoder_depth, int(c.encoder_embed_dim * c.mlp_ratio), 0
    X, Ld, Md, ed = c.decoder_embed_dim, c.decoder_depth, int(c.decoder_embed_dim * c.mlp_ratio), 0
    if c.st_use_qk_norm:
        e = 8 * D // c.encoder_n_heads
    if c.use_qk_norm:
        ed = 4 * X // c.decoder_n_heads
    pool = 5 * D * D + 3 * D * M + n * D + a * D + 8 * D + 2 * M + a
    encoder = (N + c.d_t) * D + 3 * P * P * D + D + L * (8 * D * D + 2 * D * M + 15 * D + M + e) + D + pool
    head = P * P * c.in_channels * (X + 1)
    block = 4 * X * X + 3 * X * Md + 9 * X + 2 * Md + ed
    decoder = N * X + 3 * P * P * X + X + n * a * X + X + Ld * block + X + head
    return {"encoder": encoder, "vq": c.n_codes * a, "decoder": decoder}


CONFIGS = [
    LamConfig(),
    TINY,
    replace(TINY, st_use_qk_norm=True, use_qk_norm=False, in_channels=4, mlp_ratio=2.7),
    replace(TINY, resolution=12, d_t=9, encoder_n_heads=12, encoder_depth=1, decoder_depth=3),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_parameter_counts(config):
    counts = {k: sum(p.numel() for p in m.parameters()) for k, m in meta_modules(VillaXLam, config).items()}
    assert counts == formula(config)


def test_default_model_has_the_published_size():
    modules = meta_modules(VillaXLam, LamConfig()).values()
    assert sum(p.numel() for m in modules for p in m.parameters()) == 201_330_636
    assert sum(len(m.state_dict()) for m in modules) == 427
    frozen = [p.numel() for m in modules for p in m.parameters() if not p.requires_grad]
    assert sum(frozen) == 202_752 + 196_608
    assert not [name for m in modules for name, _ in m.named_buffers()]


def test_document_has_the_original_layout(tmp_path):
    write_lam(tmp_path, VillaXLam, TINY, {}, description="a card", version=3)
    document = json.loads((tmp_path / "model_config.json").read_text())
    assert list(document) == ["architecture", "description", "version", "config"]
    golden = json.loads((DATA / "golden_public" / "model_config.json").read_text())
    assert list(document["config"]) == list(golden["config"])
    assert document["config"]["embed_tokens"] == 16
    assert read_config(tmp_path) == TINY


def test_unknown_keys_are_ignored_and_missing_ones_default(tmp_path):
    document = {"architecture": "IgorModel", "config": {"patch_size": 7, "grid_size": 99, "novelty": 1}}
    (tmp_path / "model_config.json").write_text(json.dumps(document))
    config = read_config(tmp_path)
    assert config == LamConfig(patch_size=7)
    assert config.grid_size == 32


def test_all_problems_are_told_at_once():
    with pytest.raises(LamError) as error:
        LamConfig(resolution=225, encoder_embed_dim=770, decoder_n_heads=7, d_t=1)
    message = str(error.value)
    for part in ("resolution is 225", "encoder_embed_dim is 770", "decoder_embed_dim is 768", "d_t is 1"):
        assert part in message
    with pytest.raises(LamError, match=r"mlp_ratio is 'x'(.|\n)*n_codes is 0"):
        LamConfig(n_codes=0, mlp_ratio="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "could not be read"),
        ("[]", "no JSON object"),
        ('{"architecture": "Genie", "config": {}}', "'Genie', expected one of .*'IgorModel'"),
        ('{"config": {}}', "None, expected one of .*'IgorModel'"),
        ('{"architecture": "IgorModel", "config": {"patch_size": 15}}', "multiple of patch_size"),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    (tmp_path / "model_config.json").write_text(text)
    with pytest.raises(LamError, match=message):
        read_config(tmp_path)
