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


@pytest.mark.slow
def test_lerobot_eval_computes_the_tokens_live(monkeypatch, pusht, tmp_path):
    """In two environments, which LeRobot runs in processes of their own."""
    store = precompute_tokens(
        pusht, load_lam("pusht-compact"), tmp_path / "store", camera_key=IMAGE_KEY, lam_path="pusht-compact"
    ).store
    flags = [flag for flag in SMALL_FLAGS if not flag.startswith("--dataset.repo_id")]
    train(
        monkeypatch,
        *flags,
        "--dataset.repo_id=local/pusht",
        f"--dataset.root={pusht.root}",
        f"--policy.lam_tokens_path={store.path}",
        f"--output_dir={tmp_path / 'run'}",
        "--steps=2",
    )
    shutil.rmtree(store.path)
    command = [
        Path(sys.executable).parent / "lerobot-eval",
        f"--policy.path={tmp_path / 'run' / 'checkpoints' / 'last' / 'pretrained_model'}",
        "--policy.device=cpu",
        "--policy.num_inference_steps=2",
        "--env.type=pusht",
        "--env.episode_length=12",
        "--eval.n_episodes=2",
        "--eval.batch_size=2",
        f"--output_dir={tmp_path / 'eval'}",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    info = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2

    refused = subprocess.run(
        [*map(str, command), "--policy.lam_model_path=/nowhere", f"--output_dir={tmp_path / 'eval2'}"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert refused.returncode != 0
    assert "--policy.lam_model_path" in refused.stderr


@pytest.mark.slow
def test_lerobot_eval_follows_a_video(monkeypatch, pusht, tmp_path):
    """Trained by `lerobot-train` on what comes next; one environment follows a video, one a store."""
    store = precompute_tokens(
        pusht, load_lam("pusht-compact"), tmp_path / "store", camera_key=IMAGE_KEY, lam_path="pusht-compact"
    ).store
    flags = [flag for flag in SMALL_FLAGS if not flag.startswith("--dataset.repo_id")]
    train(
        monkeypatch,
        *flags,
        "--dataset.repo_id=local/pusht",
        f"--dataset.root={pusht.root}",
        f"--policy.lam_tokens_path={store.path}",
        "--policy.lam_token_offsets=[1,2,3,4]",
        "--policy.lam_token_dropout=0.5",
        f"--output_dir={tmp_path / 'run'}",
        "--steps=2",
    )
    pictures = [pusht[i][IMAGE_KEY].permute(1, 2, 0).numpy() for i in range(12)]
    video = write_video(tmp_path / "demo.mp4", pictures, pusht.fps, "libx264", "yuv420p")
    command = [
        Path(sys.executable).parent / "lerobot-eval",
        f"--policy.path={tmp_path / 'run' / 'checkpoints' / 'last' / 'pretrained_model'}",
        "--policy.device=cpu",
        "--policy.num_inference_steps=2",
        "--env.type=pusht",
        "--env.episode_length=16",
        "--eval.n_episodes=2",
        "--eval.batch_size=2",
        "--eval.use_async_envs=false",
    ]

    def evaluate(name: str, *more: str) -> subprocess.CompletedProcess:
        words = [*map(str, command), f"--output_dir={tmp_path / name}", *more]
        return subprocess.run(words, capture_output=True, text=True, timeout=400)

    done = evaluate("eval", f"--policy.lam_guidance=[{video}#t=0,1.1,{store.path}#1]")
    assert done.returncode == 0, done.stderr[-3000:]
    info = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2
    told = done.stdout + done.stderr
    assert f"Guidance: {video}#t=0,1.1, 11 frames" in told
    assert f"Guidance {video}#t=0,1.1 has ended after 11 frames (1.1 s)" in told

    refused = evaluate("unguided")
    assert refused.returncode != 0
    assert "--policy.lam_guidance=" in refused.stderr
