"""The card of a store's repository, and its pictures."""

import sys

import pytest
from huggingface_hub import DatasetCard

from lerobot_lam_diffusion.report.build import card_pictures
from lerobot_lam_diffusion.scripts.report import illustrate
from lerobot_lam_diffusion.tokens.card import CardPicture, make_card
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS, LamInfo

REPO = "user/tokens"
PICTURES = [CardPicture("lam_tokens_use_1.png", b"\x89PNG", "share of each [code]")]


def test_it_tells_every_part_of_the_tokens_identity(store):
    card = DatasetCard(make_card(store, REPO, None, pictures=PICTURES))
    assert card.data.tags == ["lerobot", "lam-tokens"]
    assert card.data.get("license") is None  # the user's to choose
    provenance = store.provenance
    for fact in (
        provenance.dataset.digest,
        "60 frames in 5 episodes at 10 fps",
        "it covers all 5 episodes; 5 of 60 frames have no token",
        provenance.camera_key,
        "1 frame = 0.1 s",
        provenance.lam.fingerprint,
        "vq, 2 × 32 numbers (codebook of 16)",
        "float32 on cpu",
        provenance.tensors_sha256,
        "![share of each (code)](lam_tokens_use_1.png)",
    ):
        assert fact in card.text


def test_continuous_tokens_name_the_flag_that_training_needs(write_random, tmp_path):
    store = write_random(tmp_path / "store", (5, 5), token_kind=CONTINUOUS)
    text = make_card(store, REPO, "v2")
    assert "--policy.lam_tokens_path=user/tokens@v2 --policy.lam_use_vq_tokens=false" in text
    assert "Codebook use" not in text


def test_names_cannot_break_out_of_the_card(write_random, tmp_path):
    lam = LamInfo("x` | y\n\n# z; rm -rf $HOME", None, "f", 2, 4, 16, 1.0)
    text = make_card(write_random(tmp_path / "store", (5,), lam=lam), REPO, None)
    assert "| LAM | `x' \\| y # z; rm -rf $HOME` |" in text
    assert "--lam.path='x` | y" in text  # quoted for the shell


@pytest.mark.parametrize("existing", ["", "my text", "---\nlicense: mit\ntags: mine\n---\nmy text\n"])
def test_what_stands_there_stays_and_ours_is_replaced(existing, random_store):
    once = make_card(random_store, REPO, None, pictures=PICTURES, existing=existing)
    twice = make_card(random_store, REPO, None, pictures=PICTURES, existing=once)
    assert twice == once
    assert once.count("# How to train") == 1
    if existing:
        assert once.index("my text") < once.index("# tokens")
    if "mine" in existing:
        assert DatasetCard(once).data.tags == ["mine", "lerobot", "lam-tokens"]
        assert "license: mit" in once


def test_a_store_alone_has_pictures_of_its_codes(store):
    _, pictures = card_pictures(store, None)
    assert [picture.name for picture in pictures] == ["lam_tokens_use_1.png", "lam_tokens_use_2.png"]
    assert all(picture.data.startswith(b"\x89PNG") and picture.alt for picture in pictures)


def test_no_matplotlib_no_pictures(random_store, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lerobot_lam_diffusion.report.build", None)
    assert illustrate(random_store, None) == ("", [])
    assert "pip install matplotlib" in capsys.readouterr().out
