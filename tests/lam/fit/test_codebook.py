import torch

from lerobot_lam_diffusion.lam.fit.codebook import CodebookAverages, kmeans
from lerobot_lam_diffusion.lam.quantizer import Quantizer


def generator():
    return torch.Generator().manual_seed(0)


def test_kmeans_finds_the_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centres.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=generator()))[torch.randperm(150)]
    found = kmeans(points, 3, generator())
    assert torch.cdist(centres, found).amin(dim=1).max() < 0.2


def test_kmeans_of_fewer_points_than_rows():
    assert kmeans(torch.zeros(4, 2), 6, generator()).isfinite().all()


def test_rows_follow_what_chose_them_and_dead_ones_restart(tiny_config):
    vq = Quantizer(tiny_config)
    averages = CodebookAverages(vq, decay=0.5)
    target = torch.full((16, 5), 3.0)
    for _ in range(30):
        averages.update(target, torch.zeros(16, dtype=torch.long), generator(), restart=False)
    torch.testing.assert_close(vq.embedding.weight[0], target[0])
    assert not torch.allclose(vq.embedding.weight[1], target[0])
    averages.update(target, torch.zeros(16, dtype=torch.long), generator(), restart=True)
    torch.testing.assert_close(vq.embedding.weight, target[:7])
