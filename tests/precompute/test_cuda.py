"""On a GPU: the same tokens whatever the batch, copies beside the encoding, bfloat16 on request."""

import pytest
import torch

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from tests.conftest import TOP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def extract(dataset, lam_folder, tmp_path_factory):
    def run(dtype: torch.dtype = torch.float32, compile: bool = False, **options):
        lam = load_lam(lam_folder, device="cuda", dtype=dtype)
        if compile:
            lam.compile()
        folder = tmp_path_factory.mktemp("cuda") / "store"
        return precompute_tokens(
            dataset, lam, folder, camera_key=TOP, lam_path="a/lam", show_progress=False, **options
        )

    return run


def test_vq_tokens_do_not_depend_on_batches_and_threads(extract):
    stores = [
        extract(batch_size=size, num_workers=n).store for size, n in ((1, 0), (7, 1), (64, 4), (None, 2))
    ]
    assert stores[0].provenance.device == "cuda"
    assert len(stores[0].values.unique()) >= 8
    assert all(torch.equal(store.values, stores[0].values) for store in stores)


def test_compiled_and_bfloat16(extract):
    plain = extract(batch_size=8).store
    assert torch.equal(extract(batch_size=8, compile=True).store.values, plain.values)
    half = extract(torch.bfloat16, batch_size=8).store
    assert half.provenance.dtype == "bfloat16"
    agree = (half.values == plain.values)[half.frames_with_tokens()].float().mean()
    assert agree > 0.5
