"""Trained on precomputed tokens, deployed without them: stock `lerobot-eval` in the PushT simulator."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lerobot_lam_diffusion.demo.record import IMAGE_KEY
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from tests.test_lerobot_train import SMALL_FLAGS, train
from tests.videos import write_video


@pytest.fixture
def trained(monkeypatch, pusht, tmp_path):
    """`trained(*flags)`: two steps of `lerobot-train` on PushT; the store, and the words of an evaluation."""

    def trained(*flags: str) -> tuple[Path, list[str]]:
        lam, options = load_lam("pusht-compact"), {"camera_key": IMAGE_KEY, "lam_path": "pusht-compact"}
        store = precompute_tokens(pusht, lam, tmp_path / "store", **options).store
        small = [flag for flag in SMALL_FLAGS if not flag.startswith("--dataset.repo_id")]
        data = ["--dataset.repo_id=local/pusht", f"--dataset.root={pusht.root}"]
        data += [f"--policy.lam_tokens_path={store.path}", f"--output_dir={tmp_path / 'run'}", "--steps=2"]
        train(monkeypatch, *small, *data, *flags)
        return store.path, [
            str(Path(sys.executable).parent / "lerobot-eval"),
            f"--policy.path={tmp_path / 'run' / 'checkpoints' / 'last' / 'pretrained_model'}",
            "--policy.device=cpu",
            "--policy.num_inference_steps=2",
            "--env.type=pusht",
            "--eval.n_episodes=2",
            "--eval.batch_size=2",
        ]

    return trained


def evaluate(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Run `lerobot-eval`; where it succeeds it has played both episodes."""
    command = [*words, f"--output_dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if done.returncode == 0:
        assert json.loads((folder / "eval_info.json").read_text())["overall"]["n_episodes"] == 2
    return done


@pytest.mark.slow
def test_lerobot_eval_computes_the_tokens_live(trained, tmp_path):
    """In two environments, which LeRobot runs in processes of their own."""
    store, command = trained()
    shutil.rmtree(store)
    done = evaluate(tmp_path / "eval", *command, "--env.episode_length=12")
    assert done.returncode == 0, done.stderr[-3000:]
    refused = evaluate(tmp_path / "eval2", *command, "--policy.lam_model_path=/nowhere")
    assert refused.returncode != 0
    assert "--policy.lam_model_path" in refused.stderr


@pytest.mark.slow
def test_lerobot_eval_follows_a_video(trained, pusht, tmp_path):
    """Trained by `lerobot-train` on what comes next; one environment follows a video, one a store."""
    store, command = trained("--policy.lam_token_offsets=[1,2,3,4]", "--policy.lam_token_dropout=0.5")
    command += ["--env.episode_length=16", "--eval.use_async_envs=false"]
    images = [pusht[i][IMAGE_KEY].permute(1, 2, 0).numpy() for i in range(12)]
    video = write_video(tmp_path / "demo.mp4", images, pusht.fps, "libx264", "yuv420p")
    done = evaluate(tmp_path / "eval", *command, f"--policy.lam_guidance=[{video}#t=0,1.1,{store}#1]")
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stdout + done.stderr
    assert f"Guidance: {video}#t=0,1.1, 11 frames" in log
    assert f"Guidance {video}#t=0,1.1 has ended after 11 frames (1.1 s)" in log
    refused = evaluate(tmp_path / "unguided", *command)
    assert refused.returncode != 0
    assert "--policy.lam_guidance=" in refused.stderr
