"""A LAM folder that is damaged or hostile: opened as what it is, or one clear LamError."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lerobot_lam_diffusion.lam import LamConfig, fingerprint_of, load_lam, save_lam
from lerobot_lam_diffusion.lam.config import CONFIG_FILE
from lerobot_lam_diffusion.lam.locating import WEIGHTS_FILE
from lerobot_lam_diffusion.lam.quantizer import Quantizer
from lerobot_lam_diffusion.lam.villa_x.decoder import Decoder
from lerobot_lam_diffusion.lam.villa_x.encoder import Encoder
from lerobot_lam_diffusion.utils.errors import LamError
from tests.fuzz import mutations
from tests.fuzz.conftest import check_refusal

SMALLEST = LamConfig(
    resolution=4, patch_size=4, d_t=2, mlp_ratio=1.0, encoder_depth=1, encoder_embed_dim=4, encoder_n_heads=1,
    action_latent_dim=2, st_use_qk_norm=False, num_learned_tokens=2, map_heads=1, decoder_depth=1,
    decoder_embed_dim=4, decoder_n_heads=1, use_qk_norm=False, n_codes=3,
)  # fmt: skip


class Reader:
    """Loads one folder after another, and compares what is opened with the official library."""

    def __init__(self, folder: Path) -> None:
        self.good = folder / "good"
        torch.manual_seed(0)
        save_lam(self.good, SMALLEST, Encoder(SMALLEST), Quantizer(SMALLEST), Decoder(SMALLEST))
        self.weights = (self.good / WEIGHTS_FILE).read_bytes()
        self.config = (self.good / CONFIG_FILE).read_bytes()
        self.fingerprint = fingerprint_of(self.good)
        self._folders = (folder / str(number) for number in itertools.count())

    def with_weights(self, content: bytes) -> str:
        return self._try({WEIGHTS_FILE: content, CONFIG_FILE: self.config})

    def with_config(self, content: bytes) -> str:
        return self._try({WEIGHTS_FILE: self.weights, CONFIG_FILE: content})

    def _try(self, contents: dict[str, bytes]) -> str:
        folder = next(self._folders)
        folder.mkdir()
        try:
            for name, content in contents.items():
                (folder / name).write_bytes(content)
            return self.check(folder)
        finally:
            shutil.rmtree(folder)

    def check(self, folder: Path) -> str:
        try:
            lam = load_lam(folder, fdm=True)
        except LamError as error:
            return check_refusal(error, LamError)
        content = (folder / WEIGHTS_FILE).read_bytes()
        expected = safetensors.torch.load(content)
        for part, module in (("encoder", lam.encoder), ("vq", lam.vq), ("decoder", lam.decoder)):
            for name, tensor in module.state_dict().items():
                assert torch.isfinite(tensor).all()
                assert torch.equal(tensor, expected.pop(f"{part}.{name}").float())
        assert not expected
        # As text: a ratio of 1 for 1.0 gives the same model another fingerprint, as it always did.
        same = content == self.weights and str(lam.config.token_fields("")) == str(SMALLEST.token_fields(""))
        assert not same or lam.fingerprint == self.fingerprint
        return "opened"


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    return Reader(tmp_path_factory.mktemp("lam"))


def test_the_good_one_opens(reader, fuzz):
    assert fuzz("LAM weights", [("good", reader.weights)], reader.with_weights) == {"opened": 1}


@pytest.mark.slow
def test_weights(reader, fuzz):
    header = range(8 + int.from_bytes(reader.weights[:8], "little"))
    lists = mutations.joined(b"[" + b"[]," * 1_300_000 + b"[]]", b"")
    damaged = mutations.damaged(reader.weights, range(200), [range(9), header, header])
    inputs = [("4 MB of lists", lists), *mutations.forged_headers(reader.weights), *damaged]
    counts = fuzz("LAM weights", inputs, reader.with_weights)
    assert counts["refused"] > 300
    assert counts["opened"] > 10


@pytest.mark.slow
def test_config(reader, fuzz):
    every = list(mutations.damaged_json(json.loads(reader.config)))
    contents = [(f"content {number}", content) for number, content in enumerate(mutations.JSON_CONTENTS)]
    inputs = [*every[::5], *contents, *mutations.damaged(reader.config, range(100))]
    counts = fuzz("LAM config", inputs, reader.with_config)
    assert counts["refused"] > 300
    assert counts["opened"] > 10


@pytest.mark.slow
def test_every_value_of_the_config(reader, fuzz):
    fuzz("LAM config", mutations.damaged_json(json.loads(reader.config)), reader.with_config)
