"""Parity with the original code of each family, on vectors that it produced; tolerances from their .json."""

import json

import pytest
import torch
from safetensors.torch import load_file

from . import lapa_adapter, parity_adapter, univla_adapter
from .conftest import DATA

FAMILIES = {
    "villa_x": (parity_adapter, DATA),
    "lapa": (lapa_adapter, DATA / "lapa_laq"),
    "univla": (univla_adapter, DATA / "univla"),
}


class Golden:
    """A family's model, converted from the published format, and what upstream computed with it."""

    def __init__(self, family: str):
        self.adapter, folder = FAMILIES[family]
        self.info = json.loads((folder / "golden_public.json").read_text())
        self.vectors = load_file(folder / "golden_public.safetensors")
        self.model = self.adapter.load_model(folder / "golden_public")
        frames = self.vectors["in.frames"]
        prev, cur = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)
        groups = {
            "pairs": (prev, cur),
            "gap": (frames[:, 0], frames[:, -1]),
            "swapped": (cur[:2], prev[:2]),
            "same": (prev[:2], prev[:2]),
        }
        self.groups = {name: pair for name, pair in groups.items() if f"{name}.tokens" in self.vectors}

    def close(self, got, name: str, tolerance: str):
        want = self.vectors[name]
        torch.testing.assert_close(
            got.reshape(want.shape), want, rtol=0, atol=self.info["tolerance"][tolerance]
        )

    def triple(self, got, name: str):
        self.close(got.continuous, f"{name}.tokens", "tokens_max_abs")
        self.close(got.quantized, f"{name}.vq", "vq_max_abs")
        assert torch.equal(got.indices, self.vectors[f"{name}.indices"])


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request) -> Golden:
    return Golden(request.param)


def test_tokens(golden):
    model = golden.model
    for name, pair in golden.groups.items():
        golden.triple(model.encode_pairs(*pair), name)
    assert golden.vectors["pairs.indices"].unique().numel() > 1
    assert model.token_scale == pytest.approx(model.codebook.square().mean().sqrt().item())


@pytest.mark.parametrize("golden", ["univla"], indirect=True)
def test_task_irrelevant_slots(golden):
    for name, pair in golden.groups.items():
        golden.triple(golden.adapter.encode_irrelevant(golden.model, *pair), f"{name}.irrelevant")


def test_preprocessing(golden):
    got = golden.model.preprocess(golden.vectors["in.frames"])
    torch.testing.assert_close(got[0, 0], golden.vectors["pre.normalized_0_0"], rtol=0, atol=1e-5)
    assert torch.equal(golden.model.resize(golden.vectors["in.frames"]), golden.vectors["pre.resized"])


@pytest.mark.parametrize("golden", ["lapa", "univla"], indirect=True)
def test_intermediate_activations(golden):
    """Says *where* an implementation departs, when one does."""
    prev, cur = golden.groups["pairs"]
    got = golden.adapter.debug(golden.model, prev[:1], cur[:1])
    wanted = [name.removeprefix("debug.") for name in golden.vectors if name.startswith("debug.")]
    assert set(wanted) <= got.keys()
    for name in wanted:
        golden.close(got[name], f"debug.{name}", "debug_max_abs")


@pytest.mark.parametrize("golden", ["lapa", "univla"], indirect=True)
def test_decoder(golden):
    prev, _ = golden.groups["pairs"]
    if "dec.recon" not in golden.vectors:
        with pytest.raises(ValueError, match="predicts no images: UniVlaLam has no decoder to pixels"):
            golden.model.predict_next(prev, golden.vectors["pairs.vq"])
        return
    frames, latents = prev[golden.vectors["dec.pair_index"]], golden.vectors["dec.la"]
    golden.close(golden.adapter.decode(golden.model, frames, latents), "dec.recon", "dec_max_abs")
    pictures = golden.model.predict_next(frames, latents)
    want = (golden.vectors["dec.recon"] * 255).clamp(0, 255)
    assert (pictures - want).abs().max() < 0.51


def test_bfloat16_changes_little_and_quantises_in_float32(golden, tmp_path):
    from lerobot_lam_diffusion.lam import load_lam, write_lam

    model = golden.model
    modules = {name: part.state_dict() for name, part in model.modules.items()}
    state = {f"{part}.{name}": t for part, content in modules.items() for name, t in content.items()}
    write_lam(tmp_path / "lam", type(model), model.config, state)
    low = load_lam(tmp_path / "lam", dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert low.fingerprint == load_lam(tmp_path / "lam").fingerprint
    tokens, exact = (each.encode_pairs(*golden.groups["pairs"]) for each in (low, model))
    assert tokens.continuous.dtype == tokens.quantized.dtype == torch.float32
    assert torch.equal(
        tokens.quantized.unflatten(1, (model.num_learned_tokens, -1)), low.codebook[tokens.indices]
    )
    error = (tokens.continuous - exact.continuous).abs().max()
    assert 1e-4 < error < 0.1 * exact.continuous.abs().max()


def test_a_resized_frame_gives_the_same_tokens_and_an_empty_batch_none(golden):
    prev, cur = golden.groups["pairs"]
    small = golden.model.encode_pairs(golden.model.resize(prev), golden.model.resize(cur))
    assert all(map(torch.equal, small, golden.model.encode_pairs(prev, cur)))
    assert golden.model.encode_pairs(prev[:0], cur[:0]).indices.shape == (0, golden.model.num_learned_tokens)


def test_nearly_tied_codes_do_not_depend_on_the_batch(golden):
    """Every slot lies midway between two codes, as exactly as floats go; kernels that round elsewhere."""
    model, (prev, cur) = golden.model, golden.groups["pairs"]
    pairs, kept = range(len(prev)), model.vq.embedding.weight.data
    tokens = torch.cat([model.encode_pairs(prev[i : i + 1], cur[i : i + 1]).continuous for i in pairs])
    generator = torch.Generator().manual_seed(0)
    midway = tokens.view(-1, model.action_latent_dim)
    aside = 0.002 * torch.randn(midway.shape, generator=generator)
    try:
        model.vq.embedding.weight.data = torch.cat([midway + aside, midway - aside])
        alone = torch.cat([model.encode_pairs(prev[i : i + 1], cur[i : i + 1]).indices for i in pairs])

        def other_kernels(clip):  # which round elsewhere, as those of another batch shape do
            exact = model.encoder(clip)
            return exact + 1e-6 * torch.randn(exact.shape, generator=generator)

        model._batch_encoder = other_kernels
        flipped = 0
        for size in (2, 3, len(prev)):
            for start in range(0, len(prev), size):
                rows = slice(start, start + size)
                batch = model.encode_pairs(prev[rows], cur[rows])
                assert torch.equal(batch.indices, alone[rows])
                flipped += int((model.vq.indices(batch.continuous) != batch.indices).sum())
        assert flipped > 0, "rounding alone would have changed some"
    finally:
        model.vq.embedding.weight.data, model._batch_encoder = kept, model.encoder


def test_pillows_resize_in_integers():
    """Against Pillow itself, on sizes at which its versions agree."""
    import numpy as np
    from PIL import Image

    from lerobot_lam_diffusion.lam.resize import pillow_bilinear

    generator = torch.Generator().manual_seed(0)
    for height, width, size in ((60, 84, 64), (480, 640, 256), (96, 96, 256), (48, 64, 64), (64, 100, 64)):
        frames = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
        for frame, got in zip(frames, pillow_bilinear(frames, size), strict=True):
            picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
            want = np.array(picture.resize((size, size), Image.Resampling.BILINEAR))
            assert np.array_equal(got.permute(1, 2, 0).numpy(), want)


def test_a_resize_does_not_depend_on_the_batch():
    from lerobot_lam_diffusion.lam.resize import bilinear, pillow_bilinear, tensorflow_lanczos3

    frames = torch.randint(
        0, 256, (5, 3, 37, 51), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for resize in (bilinear, pillow_bilinear, tensorflow_lanczos3):
        whole = resize(frames, 28)
        assert torch.equal(whole, torch.stack([resize(frame, 28) for frame in frames]))
        assert torch.equal(whole, resize(whole, 28))
        assert resize(torch.full((3, 37, 51), 200, dtype=torch.uint8), 28).unique().tolist() == [200]
