"""Small good files of each reader, and what a refusal is."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lerobot_lam_diffusion.lam import LamConfig, save_lam
from lerobot_lam_diffusion.lam.quantizer import Quantizer
from lerobot_lam_diffusion.lam.villa_x.decoder import Decoder
from lerobot_lam_diffusion.lam.villa_x.encoder import Encoder
from lerobot_lam_diffusion.tokens import Provenance, TokenStore
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS, VQ, DatasetInfo, LamInfo
from lerobot_lam_diffusion.tokens.writer import write_store
from lerobot_lam_diffusion.utils.errors import UserError

ROWS, WIDTH = 7, 8
META = SimpleNamespace(
    repo_id="local/x",
    total_frames=ROWS,
    episodes={"dataset_from_index": [0, 4], "dataset_to_index": [4, ROWS]},
)
SMALLEST = LamConfig(
    resolution=4, patch_size=4, d_t=2, mlp_ratio=1.0, encoder_depth=1, encoder_embed_dim=4, encoder_n_heads=1,
    action_latent_dim=2, st_use_qk_norm=False, num_learned_tokens=2, map_heads=1, decoder_depth=1,
    decoder_embed_dim=4, decoder_n_heads=1, use_qk_norm=False, n_codes=3,
)  # fmt: skip
REMEDIES = ("again", "orrect", "oint to", "ake a store", "as lerobot-lam-precompute", "pip install")
LONGEST_MESSAGE = 20_000


def check_refusal(error: UserError, kind: type[UserError]) -> None:
    """A refusal is of its reader's kind, says what to do, and does not quote all the input."""
    assert type(error) is kind
    message = str(error)
    assert any(remedy in message for remedy in REMEDIES), message
    assert len(message) < LONGEST_MESSAGE, message[:2000]


def write_small(folder: Path, storage_dtype: str) -> TokenStore:
    """Episodes 0 and 2 of three; VQ where `storage_dtype` is "uint8"."""
    torch.manual_seed(0)
    kind = VQ if storage_dtype == "uint8" else CONTINUOUS
    provenance = Provenance(
        dataset=DatasetInfo("local/x", None, 9, 3, 10, "digest"),
        lam=LamInfo("some/lam", None, "fingerprint", 2, 4, 5, 1.0),
        camera_key="observation.images.top",
        frame_stride=1,
        stride_seconds=0.1,
        token_kind=kind,
        dtype="float32",
        versions={"torch": "2"},
        storage_dtype=storage_dtype,
        skipped={"1": "no frame"},
    )
    values = torch.randint(5, (ROWS, 2)) if kind == VQ else torch.rand(ROWS, WIDTH) + 1
    lengths = torch.tensor([3, 2, 4])
    stop, covered = lengths.cumsum(0), torch.tensor([True, False, True])
    return write_store(folder, provenance, [values], torch.rand(5, 4) + 1, stop - lengths, stop, covered)


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> dict[str, Path]:
    """A folder for each reader: a LAM, a VQ store, an int8 store, a `.pt` file."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    save_lam(folder / "LAM", SMALLEST, Encoder(SMALLEST), Quantizer(SMALLEST), Decoder(SMALLEST))
    write_small(folder / "store", "uint8")
    write_small(folder / "int8", "int8")
    (folder / "pt").mkdir()
    document = {"tokens": torch.rand(ROWS, WIDTH) + 1, "metadata": {"frame_stride": 2}}
    torch.save(document, folder / "pt" / "tokens.pt")
    return {path.name: path for path in folder.iterdir()}
