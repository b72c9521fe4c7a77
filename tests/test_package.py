"""The built wheel in a fresh environment: what `pip install` gives a LeRobot user."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lerobot_lam_diffusion
from lerobot_lam_diffusion import modeling_diffusion_lam
from tests.test_lerobot_train import SMALL_FLAGS, weights

ROOT = Path(__file__).parents[1]


def test_promised_names():
    names = ["DiffusionLamConfig", "DiffusionLamPolicy", "DiffusionLamModel", "LamTokenDataset", "TokenStore"]
    for name in [*names, "load_lam"]:
        assert getattr(lerobot_lam_diffusion, name).__name__ == name
    for module in (lerobot_lam_diffusion, modeling_diffusion_lam):
        assert module.OBS_LAM_TOKENS == "observation.lam_tokens"
        assert module.OBS_LAM_IMAGES == "observation.lam_images"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lerobot_lam_diffusion.nonsense


def uv() -> str:
    found = shutil.which("uv") or str(ROOT / ".cache" / "uv" / "bin" / "uv")
    if not Path(found).exists():
        pytest.fail("uv is missing: run the tests by `make test-slow`, which brings it")
    return found


@pytest.mark.slow
def test_wheel_in_a_fresh_venv_runs_stock_lerobot_train(dataset, store, tmp_path):
    subprocess.run([uv(), "build", "--wheel", "--out-dir", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("lerobot_policy_diffusion_lam-")
    contents = zipfile.ZipFile(wheel).namelist()
    assert {"lerobot_policy_diffusion_lam.py", "lerobot_lam_commands.py"} <= set(contents)
    assert "lerobot_lam_diffusion/scripts/help_texts/lerobot-lam-tokens-verify.txt" in contents
    assert "lerobot_lam_diffusion/assets/pusht-compact/model.safetensors" in contents
    for folder in ("docs", "configs"):
        shipped = {
            f"lerobot_lam_diffusion/{page.relative_to(ROOT)}" for page in (ROOT / folder).glob("*.[my]*")
        }
        assert shipped <= set(contents)
    assert not [name for name in contents if name.startswith(("tests/", "configs/", "docs/"))]

    venv = tmp_path / "venv"
    subprocess.run([uv(), "venv", "--python", sys.executable, venv], check=True, timeout=120)
    install = [uv(), "pip", "install", "--python", venv / "bin" / "python", wheel]
    subprocess.run(install, check=True, timeout=900)

    run = tmp_path / "run"
    command = [venv / "bin" / "lerobot-train", *SMALL_FLAGS, f"--dataset.root={dataset.root}"]
    command += [f"--policy.lam_tokens_path={store.path}", f"--output_dir={run}", "--steps=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(run)
