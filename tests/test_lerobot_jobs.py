"""`lerobot-train --job.target=…` sends this policy's config to HF Jobs, where LeRobot reads it back."""

import json
import sys

import pytest
from lerobot.configs import parser
from lerobot.configs.train import TrainPipelineConfig
from lerobot.jobs.hf import build_remote_config_file

from lerobot_lam_diffusion import DiffusionLamConfig


def by_lerobot(monkeypatch, *words: str) -> TrainPipelineConfig:
    def checked(config: TrainPipelineConfig) -> TrainPipelineConfig:
        config.validate()
        return config

    monkeypatch.setattr(sys, "argv", ["lerobot-train", *words])
    return parser.wrap()(checked)()


@pytest.mark.slow
def test_the_config_of_a_job_is_read_where_the_job_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sent = by_lerobot(
        monkeypatch,
        "--policy.type=diffusion_lam",
        "--policy.use_precomputed_lam_tokens=true",
        "--policy.lam_tokens_path=user/data-lam-tokens",
        "--policy.repo_id=user/policy",
        "--dataset.repo_id=user/data",
        "--dataset.root=/only/here",
        "--job.target=a10g-small",
        "--job.image=user/lerobot-lam:latest",
    )
    path = build_remote_config_file(sent, "user/policy", tmp_path / "train_config.json", tags=["lerobot"])
    assert "job" not in json.loads(path.read_text())
    read = by_lerobot(monkeypatch, f"--config_path={path}")
    assert isinstance(read.policy, DiffusionLamConfig)
    assert read.policy.lam_tokens_path == "user/data-lam-tokens"
    assert read.dataset.root is None
    assert not read.job.is_remote
