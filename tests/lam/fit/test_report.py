import math

import pytest
import torch

from lerobot_lam_diffusion.lam.fit.report import perplexity, probe


def test_perplexity_counts_codes():
    assert perplexity(torch.tensor([3, 3, 3]), 8) == pytest.approx(1)
    assert perplexity(torch.arange(8).repeat(5), 8) == pytest.approx(8)
    assert perplexity(torch.tensor([0, 0, 1]), 8) == pytest.approx(3 / math.exp(2 / 3 * math.log(2)))


def test_probe_tells_meaning_from_chance():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(600, 8, generator=generator)
    changes = tokens[:, :2] @ torch.tensor([[2.0, 1.0], [0.0, 3.0]]) + 5
    result = probe(tokens[:400], changes[:400], tokens[400:], changes[400:])
    assert result.token > 0.99
    assert result.shuffled < 0.05
    others = torch.randn(600, 8, generator=generator)
    noise = probe(others[:400], changes[:400], others[400:], changes[400:])
    assert noise.token < 0.1


@pytest.mark.parametrize("still_in", ["all pairs", "the measured pairs"])
def test_an_axis_that_does_not_change_does_not_count(still_in):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(600, 8, generator=generator)
    changes = torch.cat([tokens[:, :1] * 2, torch.randn(600, 1, generator=generator)], dim=1)
    changes[0 if still_in == "all pairs" else 400 :, 1] = 0.5
    result = probe(tokens[:400], changes[:400], tokens[400:], changes[400:])
    assert result.token > 0.99
    assert result.shuffled < 0.05


def test_probe_survives_a_collapsed_code():
    result = probe(torch.ones(50, 4), torch.randn(50, 2), torch.ones(20, 4), torch.randn(20, 2))
    assert math.isfinite(result.token)
    assert result.token < 0.1
