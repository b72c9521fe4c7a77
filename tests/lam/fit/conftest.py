import pytest
import torch

from lerobot_lam_diffusion.lam.fit.data import FitData


@pytest.fixture
def squares() -> FitData:
    """Six episodes of twenty 32 px frames: a square walks over a dark ground; its place is the state."""
    generator = torch.Generator().manual_seed(0)
    frames, states = [], []
    for _ in range(6):
        place = torch.randint(8, 18, (2,), generator=generator)
        for _ in range(20):
            frame = torch.full((3, 32, 32), 30, dtype=torch.uint8)
            frame[:, place[1] : place[1] + 6, place[0] : place[0] + 6] = 220
            frames.append(frame)
            states.append(place.float())
            place = (place + torch.randint(-3, 4, (2,), generator=generator)).clamp(0, 26)
    episodes = torch.arange(6).repeat_interleave(20)
    return FitData(torch.stack(frames), episodes, torch.stack(states), holdout_episodes=2)
