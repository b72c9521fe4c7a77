"""What training says beside the loss; the loss itself does not notice."""

import pytest
import torch
from torch import nn

from lerobot_lam_diffusion.policy.training_figures import EVERY, TrainingFigures


class Toy(nn.Module):
    """Draws random numbers, changes a buffer, and uses the token by `weight`."""

    def __init__(self, weight):
        super().__init__()
        self.stock, self.lam = nn.Linear(3, 1), nn.Linear(2, 1, bias=False)
        nn.init.constant_(self.lam.weight, weight)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, batch):
        noise = torch.randn(len(batch["x"]), 1)
        out = self.stock(self.norm(batch["x"])) + self.lam(batch["tokens"][:, -1])
        return (out - batch["y"] - 0.1 * noise).square().mean(), None


def batch():
    tokens = torch.randn(8, 1, 2, generator=torch.Generator().manual_seed(3))
    tokens[:2] = 0
    return {"x": torch.randn(8, 3, generator=torch.Generator().manual_seed(4)), "tokens": tokens,
            "y": tokens.sum((1, 2)).unsqueeze(1)}  # fmt: skip


def run(weight, with_figures, steps=3, autocast=False):
    torch.manual_seed(0)
    toy, figures, losses, said = Toy(weight), TrainingFigures(), [], {}
    optimizer = torch.optim.SGD(toy.parameters(), 1e-2)
    for _ in range(steps):
        layers = [(toy.stock, toy.lam)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if with_figures:
                loss, said = figures.loss(toy, batch(), "tokens", layers, toy)
            else:
                loss, _ = toy(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, said, toy.norm.running_mean, torch.rand(2)


@pytest.mark.parametrize("autocast", [False, True])
def test_losses_buffers_and_random_numbers_are_those_without_figures(autocast):
    steps = EVERY + 2  # two passes with shuffled tokens
    told, plain = run(1.0, True, steps, autocast), run(1.0, False, steps, autocast)
    assert told[0] == plain[0]
    assert torch.equal(told[2], plain[2])
    assert torch.equal(told[3], plain[3])


def test_a_policy_that_uses_its_tokens_says_so():
    _, said, *_ = run(1.0, True)
    assert said["lam_token_share"] == pytest.approx(6 / 8)
    assert said["lam_norm_ratio"] > 0.5
    assert said["lam_shuffled_loss_ratio"] > 1.5


def test_a_policy_that_ignores_its_tokens_says_so():
    _, said, *_ = run(0.0, True, 1)
    assert said["lam_norm_ratio"] == 0
    assert said["lam_shuffled_loss_ratio"] == 1


def test_a_batch_of_one_has_no_other_token():
    toy, one = Toy(1.0), {name: value[:1] for name, value in batch().items()}
    toy.eval()
    _, said = TrainingFigures().loss(toy, one, "tokens", [(toy.stock, toy.lam)], toy)
    assert set(said) == {"lam_token_share"}
