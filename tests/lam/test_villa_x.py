import pytest
import torch

from lerobot_lam_diffusion.lam import LamTokens, load_lam
from lerobot_lam_diffusion.utils.errors import LamError


@pytest.fixture
def lam(lam_folder):
    return load_lam(lam_folder, fdm=True)


def test_shapes_dtypes_and_attributes(lam, make_frames):
    tokens = lam.encode_pairs(make_frames(4, 3, 20, 30), make_frames(4, 3, 20, 30, seed=1))
    assert isinstance(tokens, LamTokens)
    assert tokens.continuous.shape == tokens.quantized.shape == (4, 15)
    assert tokens.indices.shape == (4, 3)
    assert [t.dtype for t in tokens] == [torch.float32, torch.float32, torch.int64]
    assert (lam.num_learned_tokens, lam.action_latent_dim, lam.token_dim, lam.num_codes) == (3, 5, 15, 7)
    assert lam.codebook.shape == (7, 5)
    assert not any(t.requires_grad or t.is_inference() for t in tokens), "usable inside a training step"


def test_quantized_tokens_are_codebook_rows_bit_for_bit(lam, make_frames):
    tokens = lam.encode_pairs(make_frames(32, 3, 16, 16), make_frames(32, 3, 16, 16, seed=1))
    assert torch.equal(tokens.quantized.view(32, 3, 5), lam.codebook[tokens.indices])
    distances = (tokens.continuous.view(32, 3, 1, 5) - lam.codebook).norm(dim=-1)
    assert torch.equal(distances.argmin(-1), tokens.indices)


def test_ties_take_the_first_code(make_lam_folder, make_frames):
    lam = load_lam(make_lam_folder())
    lam.vq.embedding.weight.data[:] = 1.0
    assert lam.encode_pairs(make_frames(2, 3, 16, 16), make_frames(2, 3, 16, 16)).indices.eq(0).all()


def test_clip_tokens_never_see_later_frames(lam, make_frames):
    clip = make_frames(2, 3, 3, 16, 16)
    tokens = lam.encode_clip(clip).continuous
    torch.testing.assert_close(lam.encode_clip(clip[:, :2]).continuous, tokens[:, :1])
    pair = lam.encode_pairs(clip[:, 1], clip[:, 2]).continuous
    assert (pair - tokens[:, 1]).abs().max() > 1e-3, "context is part of a token"


def test_long_clips_slide(lam, make_frames):
    clip = make_frames(2, 5, 3, 16, 16)  # d_t is 3
    tokens = lam.encode_clip(clip)
    assert tokens.continuous.shape == (2, 4, 15)
    assert tokens.indices.shape == (2, 4, 3)
    for pair, start in [(2, 1), (3, 2)]:
        window = lam.encode_clip(clip[:, start : start + 3])
        torch.testing.assert_close(tokens.continuous[:, pair], window.continuous[:, -1])


def test_a_pair_is_a_window_shorter_than_d_t(make_lam_folder, make_frames):
    """The original pads here; with d_t - T >= P it fails, ours is the same function without padding."""
    prev, cur = make_frames(2, 3, 16, 16), make_frames(2, 3, 16, 16, seed=1)
    lam = load_lam(make_lam_folder("long", d_t=12))
    assert lam.encode_pairs(prev, cur).continuous.shape == (2, 15)


def test_order_of_the_frames_matters(lam, make_frames):
    prev, cur = make_frames(2, 3, 16, 16), make_frames(2, 3, 16, 16, seed=1)
    forth, back = lam.encode_pairs(prev, cur).continuous, lam.encode_pairs(cur, prev).continuous
    assert (forth - back).abs().max() > 1e-3


def test_one_learned_token_works(make_lam_folder, make_frames):
    lam = load_lam(make_lam_folder("single", num_learned_tokens=1))
    assert lam.encode_pairs(make_frames(2, 3, 16, 16), make_frames(2, 3, 16, 16)).indices.shape == (2, 1)


def test_predicted_frames(lam, make_frames):
    frames = make_frames(2, 3, 20, 30)
    tokens = lam.encode_pairs(frames, make_frames(2, 3, 20, 30, seed=1))
    predicted = lam.predict_next(frames, tokens.quantized)
    assert predicted.shape == (2, 3, 16, 16)
    assert predicted.dtype == torch.uint8
    other = lam.predict_next(frames, tokens.quantized + 10)
    assert not torch.equal(predicted, other), "the action matters"


def test_fdm_is_asked_for(lam_folder, make_frames):
    with pytest.raises(LamError, match="fdm=True"):
        load_lam(lam_folder).predict_next(make_frames(1, 3, 16, 16), torch.zeros(1, 15))


def test_fdm_of_other_channels(make_lam_folder, make_frames):
    lam = load_lam(make_lam_folder("grey", in_channels=1), fdm=True)
    assert lam.predict_patches(make_frames(1, 3, 16, 16), torch.zeros(1, 15)).shape == (1, 16, 16)
    with pytest.raises(LamError, match="predicts 1 channels"):
        lam.predict_next(make_frames(1, 3, 16, 16), torch.zeros(1, 15))


@pytest.mark.parametrize(
    ("prev", "cur", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), r"torch\.float32, expected torch\.uint8"),
        (torch.zeros(2, 8, 8, 3).byte(), torch.zeros(2, 8, 8, 3).byte(), "channels-first"),
        (torch.zeros(3, 8, 8).byte(), torch.zeros(3, 8, 8).byte(), r"\(B, 3, H, W\)"),
        (torch.zeros(2, 3, 8, 8).byte(), torch.zeros(1, 3, 8, 8).byte(), "both frames"),
    ],
)
def test_bad_frames(lam, prev, cur, message):
    with pytest.raises(LamError, match=message):
        lam.encode_pairs(prev, cur)


def test_bad_frames_are_not_resized_either(lam):
    with pytest.raises(LamError, match=r"expected torch\.uint8"):
        lam.resize(torch.zeros(2, 3, 8, 8))


def test_the_scale_of_a_token_is_the_codebooks_root_mean_square(lam):
    lam.vq.embedding.weight.data = torch.tensor([[3.0, 0.0], [4.0, 5.0]])
    assert lam.token_scale == pytest.approx((50 / 4) ** 0.5)
    lam.vq.embedding.weight.data.zero_()
    assert lam.token_scale == 1.0


def test_bad_clips_and_latents(lam, make_frames):
    with pytest.raises(LamError, match="at least 2"):
        lam.encode_clip(make_frames(1, 1, 3, 16, 16))
    with pytest.raises(LamError, match=r"\(1, 14\), expected \(1, 15\)"):
        lam.predict_next(make_frames(1, 3, 16, 16), torch.zeros(1, 14))
