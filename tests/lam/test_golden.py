"""Parity with the original villa-X package in what only it has; the rest is in test_parity.py."""

import json

import pytest
import torch

from lerobot_lam_diffusion.lam import load_lam

from . import parity_adapter as adapter
from .conftest import DATA

TOLERANCE = json.loads((DATA / "golden_public.json").read_text())["tolerance"]


@pytest.fixture(scope="module")
def lam():
    return load_lam(DATA / "golden_public", fdm=True)


def assert_close(got, want, tolerance):
    torch.testing.assert_close(got.reshape(want.shape), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [3, 4, 5])  # d_t is 4: the last one slides
def test_clips(lam, golden, length):
    got, name = lam.encode_clip(golden["in.frames"][:, :length]), f"clip{length}"
    assert_close(got.continuous, golden[f"{name}.tokens"], TOLERANCE["tokens_max_abs"])
    assert_close(got.quantized, golden[f"{name}.vq"], TOLERANCE["vq_max_abs"])
    assert torch.equal(got.indices, golden[f"{name}.indices"])


def test_decoder(lam, golden):
    prev = golden["in.frames"][:, :-1].flatten(0, 1)
    frames, latents = prev[golden["dec.pair_index"]], golden["dec.la"].flatten(1)
    patches = lam.predict_patches(frames, latents)
    assert_close(patches, golden["dec.patches"], TOLERANCE["dec_patches_max_abs"])
    error = (lam.predict_next(frames, latents).int() - golden["dec.frames_u8"].int()).abs()
    assert error.max() <= TOLERANCE["dec_u8_max_diff"]
    assert (error > 0).float().mean() <= TOLERANCE["dec_u8_mismatch_fraction"]


def test_fresh_tables(lam, golden):
    for name, table in adapter.tables(lam).items():
        assert_close(table, golden[f"table.{name}"], TOLERANCE["tables_max_abs"])


def test_rms_norm(lam, golden):
    rows = golden["unit.rms.in"]
    assert (rows == 0).all(dim=1).any(), "one row is zero, and stays zero"
    with torch.no_grad():
        assert_close(lam.encoder.norm(rows), golden["unit.rms.out"], 1e-6)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("embed", "patch_embed"),
        *[(f"layers.{i}.{part}", f"block{i}.{label}") for i in (0, 1) for part, label in
          [("attn", "spatial_attn"), ("attn_temp", "temporal_attn"), ("mlp", "mlp"), ("", "out")]],
        ("norm", "norm"),
        *[(f"map_block.{part}", f"map.{part}") for part in ("attn", "attn_norm", "mlp_norm")],
        ("map_block", "map.out"),
    ],
)  # fmt: skip
def test_intermediate_activations(lam, golden, module, name):
    """Says *where* an implementation departs, when one does."""
    captured = {}
    hooked = lam.encoder.get_submodule(module.rstrip("."))
    handle = hooked.register_forward_hook(lambda _module, _inputs, output: captured.update(out=output))
    lam.encode_pairs(golden["in.frames"][:1, 0], golden["in.frames"][:1, 1])
    handle.remove()
    got, want = captured["out"], golden[f"debug.{name}"]
    if "attn_temp" in module:
        got = got.squeeze(0)  # (T, N, D)
    assert_close(got.contiguous(), want, TOLERANCE["tokens_max_abs"])
