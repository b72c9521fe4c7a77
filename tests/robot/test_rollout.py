"""A robot that the package does not know: `lerobot-record`, tokens, `lerobot-train`, `lerobot-rollout`."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from tests.test_lerobot_train import SMALL_FLAGS, train

CAMERA = "observation.images.top"
FPS = 10
STRIDE = 2
ROBOT = ["--robot.type=pushtarm", "--robot.id=one", "--play_sounds=false"]


def run(command, *flags, home, **environment):
    """The output of one of LeRobot's commands, which finds the plugin as an installed distribution."""
    paths = {"PYTHONPATH": str(Path(__file__).parent / "plugin"), "HF_LEROBOT_HOME": str(home)}
    words = [str(Path(sys.executable).parent / command), *map(str, flags)]
    done = subprocess.run(
        words, env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=560
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_live_tokens_on_a_robot_are_the_lams_bit_for_bit(tmp_path, monkeypatch):
    recorded = ["--dataset.push_to_hub=false", "--dataset.single_task=circle", "--dataset.reset_time_s=0"]
    recorded += ["--dataset.repo_id=local/circle", "--dataset.no_stamp=true", f"--dataset.fps={FPS}"]
    recorded += [f"--dataset.root={tmp_path / 'data'}", "--dataset.num_episodes=2"]
    recorded += ["--dataset.episode_time_s=3", "--teleop.type=pushtarm_circle", "--teleop.id=one"]
    status, told = run("lerobot-record", *ROBOT, *recorded, home=tmp_path)
    assert status == 0, told[-3000:]

    dataset = LeRobotDataset("local/circle", root=tmp_path / "data", video_backend="pyav", return_uint8=True)
    lam = load_lam("pusht-compact")
    store = precompute_tokens(
        dataset, lam, tmp_path / "store", camera_key=CAMERA, lam_path="pusht-compact", frame_stride=STRIDE
    ).store
    train(
        monkeypatch,
        *[flag for flag in SMALL_FLAGS if not flag.startswith("--dataset.repo_id")],
        "--dataset.repo_id=local/circle",
        f"--dataset.root={dataset.root}",
        f"--policy.lam_tokens_path={store.path}",
        "--policy.num_inference_steps=2",
        f"--output_dir={tmp_path / 'run'}",
        "--steps=2",
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    config = PreTrainedConfig.from_pretrained(checkpoint)
    assert (config.lam_fps, config.lam_frame_size) == (FPS, "96x96")

    rollout = ["--strategy.type=base", f"--policy.path={checkpoint}", f"--fps={FPS}", "--task=circle"]
    rollout += ["--duration=15", "--return_to_initial_position=false"]
    log = tmp_path / "log.npz"
    status, told = run("lerobot-rollout", *ROBOT, *rollout, home=tmp_path, PUSHTARM_LOG=str(log))
    assert status == 0, told[-3000:]
    with np.load(log) as happened:
        frames = torch.from_numpy(happened["frames"]).permute(0, 3, 1, 2).contiguous()
        at, tokens = happened["at"].tolist(), torch.from_numpy(happened["tokens"])
    assert len(at) > 3
    # Conditioned on once for each chunk, at the frame before which `at` frames had come. The first frame of
    # all is the one by which LeRobot captures the initial position: the policy does not see it.
    chunks = dict(zip(at, tokens[:, 0, -1], strict=True))
    for count, token in chunks.items():
        expected = torch.zeros_like(token)
        if count - 1 - STRIDE >= 1:
            pair = frames[count - 1 - STRIDE][None], frames[count - 1][None]
            expected = lam.encode_pairs(*pair).quantized[0]
        assert torch.equal(token, expected / config.lam_token_scale), f"frame {count - 1}"
    assert torch.stack(list(chunks.values())).unique(dim=0).shape[0] > 2

    gone = f"--policy.lam_model_path={tmp_path / 'nowhere'}"
    status, told = run("lerobot-rollout", *ROBOT, *rollout, gone, home=tmp_path)
    assert status != 0
    assert "--policy.lam_model_path" in told
    assert "Robot connected" not in told
