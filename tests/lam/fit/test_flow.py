import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lerobot_lam_diffusion.lam.fit.flow import mean_flow

SCALES = torch.tensor([1, 2, 4]).repeat_interleave(2)


def disc(x: float, y: float, texture: int = 0) -> torch.Tensor:
    """A soft bright disc over a ground that stands still, uint8 (1, 3, 64, 64)."""
    ground = torch.randint(0, 2, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * texture
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    cover = torch.sigmoid(8 - ((columns - x) ** 2 + (rows - y) ** 2).sqrt())
    grey = ground.repeat_interleave(8, 2).repeat_interleave(8, 3)[0, 0]
    return (grey + (220 - grey) * cover).round().to(torch.uint8).expand(1, 3, 64, 64)


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(25, 39), st.floats(25, 39))
def test_tells_the_shift_of_what_moves(dx, dy, x, y):
    assume(max(abs(dx), abs(dy)) > 0.7)  # less does not count as moving
    flow = mean_flow(disc(x, y), disc(x + dx, y + dy)) * SCALES
    assert flow[0].view(3, 2) == pytest.approx(torch.tensor([[dx, dy]] * 3), abs=0.5)


@pytest.mark.parametrize("texture", [0, 90])
def test_what_stands_still_does_not_count(texture):
    flow = mean_flow(disc(30, 30, texture), disc(31.5, 30, texture))
    assert 1 < flow[0, 0] < 2
    assert abs(flow[0, 1]) < 0.3


def test_no_motion_is_zero():
    still = disc(30, 30, 90)
    assert torch.equal(mean_flow(still, still), torch.zeros(1, 6))
    flat = torch.full((2, 3, 16, 16), 7, dtype=torch.uint8)
    assert torch.equal(mean_flow(flat, flat), torch.zeros(2, 6))
