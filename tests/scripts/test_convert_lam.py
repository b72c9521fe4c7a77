"""`lerobot-lam-convert`, from its flags to its closing lines."""

from pathlib import Path

import pytest

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.scripts.convert_lam import main

DATA = Path(__file__).parents[1] / "lam" / "data"
LAPA = DATA / "lapa_laq" / "golden_public" / "laq.pt"
UNIVLA = DATA / "univla" / "golden_public" / "lam-stage-2.ckpt"


def test_a_checkpoint_becomes_a_lam(tmp_path, capsys):
    main([str(LAPA), f"--output_dir={tmp_path / 'lam'}", "--dims.image_size=64", "--keep_fdm=true"])
    told = capsys.readouterr().out
    for part in (
        "LapaLaq",
        "4 × 6, 12 codes",
        "0.6 s apart",
        "lerobot-lam-precompute",
        f"--lam.path={tmp_path}",
    ):
        assert part in told
    assert load_lam(tmp_path / "lam", fdm=True).config.image_size == 64


def test_dashed_spellings(tmp_path, capsys):
    dashed = ["--image-size", "56", "--num-heads=5", "--dino-num-heads", "4", "--family=univla"]
    main([str(UNIVLA), "--output-dir", str(tmp_path / "lam"), *dashed])
    assert "UniVlaLam" in capsys.readouterr().out
    config = load_lam(tmp_path / "lam").config
    assert (config.image_size, config.num_heads, config.dino_num_heads) == (56, 5, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "field(s) --source for ConvertConfig"),
        (["a.pt", "b.pt"], "expected one SOURCE, found a.pt, b.pt"),
        ([str(LAPA), "--family=moto"], "--family=moto must be one of lapa, univla"),
        ([str(LAPA), "--dims.image_size=0"], "--dims.image_size=0 must be at least 1"),
        ([str(LAPA)], "give 196 tokens"),  # 256 pixels in patches of 8
        (["nothing.pt"], "There is no checkpoint at 'nothing.pt'"),
    ],
)
def test_bad_input(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([*words, f"--output_dir={tmp_path / 'lam'}"])
    assert message in f"{stop.value.code}{capsys.readouterr().err}"
    assert not (tmp_path / "lam").exists()
