"""The card and the picture of a store's repository."""

import struct
import sys

import pytest
from huggingface_hub import DatasetCard

from lerobot_lam_diffusion.tokens.card import PICTURE_FILE, make_card
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS, LamInfo
from lerobot_lam_diffusion.tokens.push import _picture
from lerobot_lam_diffusion.tokens.usage_picture import draw_usage

REPO = "user/tokens"


def test_it_tells_every_part_of_the_tokens_identity(store):
    card = DatasetCard(make_card(store, REPO, None, has_picture=True))
    assert card.data.tags == ["lerobot", "lam-tokens"]
    assert card.data.get("license") is None  # the user's to choose
    provenance = store.provenance
    for fact in (
        provenance.dataset.digest,
        "60 frames in 5 episodes at 10 fps",
        "it covers all 5 episodes; 5 frames at episode starts have no token",
        provenance.camera_key,
        "1 frame = 0.1 s",
        provenance.lam.fingerprint,
        "vq, 2 × 32 numbers (codebook of 16)",
        "float32 on cpu",
        provenance.tensors_sha256,
        f"({PICTURE_FILE})",
    ):
        assert fact in card.text


def test_without_a_picture_a_table_tells_the_use_of_every_code(random_store):
    text = make_card(random_store, REPO, None, has_picture=False)
    assert PICTURE_FILE not in text
    rows = [line for line in text.splitlines() if line.count("%") == 2]
    assert len(rows) == 16
    shares = [float(cell.strip(" %")) for row in rows for cell in row.split("|")[2:4]]
    assert sum(shares) == pytest.approx(200, abs=1)


def test_continuous_tokens_name_the_flag_that_training_needs(write_random, tmp_path):
    store = write_random(tmp_path / "store", (5, 5), token_kind=CONTINUOUS)
    text = make_card(store, REPO, "v2", has_picture=False)
    assert "--policy.lam_tokens_path=user/tokens@v2 --policy.lam_use_vq_tokens=false" in text
    assert "Codebook use" not in text


def test_names_cannot_break_out_of_the_card(write_random, tmp_path):
    lam = LamInfo("x` | y\n\n# z; rm -rf $HOME", None, "f", 2, 4, 16, 1.0)
    text = make_card(write_random(tmp_path / "store", (5,), lam=lam), REPO, None, has_picture=False)
    assert "| LAM | `x' \\| y # z; rm -rf $HOME` |" in text
    assert "--lam.path='x` | y" in text  # quoted for the shell


@pytest.mark.parametrize("existing", ["", "my text", "---\nlicense: mit\ntags: mine\n---\nmy text\n"])
def test_what_stands_there_stays_and_ours_is_replaced(existing, random_store):
    once = make_card(random_store, REPO, None, has_picture=True, existing=existing)
    twice = make_card(random_store, REPO, None, has_picture=True, existing=once)
    assert twice == once
    assert once.count("# How to train") == 1
    if existing:
        assert once.index("my text") < once.index("# tokens")
    if "mine" in existing:
        assert DatasetCard(once).data.tags == ["mine", "lerobot", "lam-tokens"]
        assert "license: mit" in once


@pytest.mark.parametrize(("slots", "num_codes"), [(1, 4), (2, 16), (12, 600)])
def test_the_picture_grows_with_the_slots(slots, num_codes, write_random, random_store, tmp_path):
    from dataclasses import replace

    shape = replace(random_store.provenance.lam, num_codes=num_codes)
    store = write_random(tmp_path / "store", (9, 40), num_codes=num_codes, lam=shape)
    store.values = store.values[:, :1].repeat(1, slots)
    content = draw_usage(store, "user/tokens", tmp_path / "x.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert width == 990
    assert abs(height - 110 * (1.65 + 1.55 * min(slots, 8))) <= 1


def test_no_matplotlib_no_picture(random_store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert _picture(random_store, "x", tmp_path / "x.png") is None
