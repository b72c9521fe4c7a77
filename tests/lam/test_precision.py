import pytest
import torch

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.lam.precision import _switches, full_precision

from .conftest import DATA


@pytest.fixture
def pairs(golden):
    return golden["in.frames"][:, :-1].flatten(0, 1), golden["in.frames"][:, 1:].flatten(0, 1)


@pytest.fixture
def reduced_precision():
    """What LeRobot's and Accelerate's training switch on around a policy."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield
    torch.set_float32_matmul_precision("highest")


def test_float32_is_immune_to_autocast(pairs):
    lam = load_lam(DATA / "golden_public")
    plain = lam.encode_pairs(*pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = lam.encode_pairs(*pairs)
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu"), "restored"
    assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))


def test_reduced_precision_is_restored(reduced_precision):
    before = [getattr(owner, name) for owner, name, _ in _switches()]
    assert before[:3] == ["tf32", "tf32", "bf16"]
    with full_precision(torch.device("cpu")):
        assert all(getattr(owner, name) == "ieee" for owner, name, _ in _switches())
        assert not torch.is_autocast_enabled("cpu")
    assert [getattr(owner, name) for owner, name, _ in _switches()] == before
    assert torch.backends.cuda.matmul.allow_tf32, "the older way of asking still answers"
    assert torch.is_autocast_enabled("cpu")


def test_of_several_threads_the_last_one_restores(reduced_precision):
    before = [getattr(owner, name) for owner, name, _ in _switches()]
    first, second = full_precision(torch.device("cpu")), full_precision(torch.device("cpu"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # the second one is still at work
    assert all(getattr(owner, name) == "ieee" for owner, name, _ in _switches())
    second.__exit__(None, None, None)
    assert [getattr(owner, name) for owner, name, _ in _switches()] == before


def test_restored_after_an_error(reduced_precision):
    with pytest.raises(RuntimeError), full_precision(torch.device("cpu")):
        raise RuntimeError
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float32_is_immune_to_tf32(pairs, reduced_precision, golden):
    tokens = load_lam(DATA / "golden_public", device="cuda").encode_pairs(*pairs)
    difference = (tokens.continuous.cpu() - golden["pairs.tokens"].flatten(1)).abs().max()
    assert difference < 2e-5
    assert torch.equal(tokens.indices.cpu(), golden["pairs.indices"])
