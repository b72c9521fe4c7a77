"""Commands that read token stores only start without LeRobot, whose import takes many times as long."""

import os
import subprocess
import sys

import pytest

from tests.hub_server import OWNER, serve

_STEPS = """
import sys
import lerobot_lam_commands
for line in sys.argv[1:]:
    lerobot_lam_commands.tokens(line.split())
heavy = ("lerobot.policies", "lerobot.datasets", "lerobot.configs", "datasets", "pandas", "torchvision")
print("imported:", [name for name in heavy if name in sys.modules])
"""
_REGISTERED = """
import lerobot_lam_diffusion
from lerobot.configs.policies import PreTrainedConfig
print("registered:", "diffusion_lam" in PreTrainedConfig.get_known_choices())
"""


def printed_by(code, *words, **variables):
    """What a fresh process prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_store_commands_do_without_lerobot(store, tmp_path):
    with serve() as server:
        told = printed_by(
            _STEPS,
            f"info {store.path}",
            f"verify {store.path}",
            f"merge {store.path} --output_dir={tmp_path / 'merged'}",
            f"export {store.path} --format=npy --output={tmp_path / 'tokens.npy'}",
            f"push {store.path} --repo_id=user/tokens",
            f"pull user/tokens --output_dir={tmp_path / 'pulled'}",
            "cache list",
            "cache prune --all=true",
            "cache path",
            HF_HOME=str(tmp_path / "home"),
            HF_TOKEN=OWNER,
            HF_ENDPOINT=server.url,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_LEROBOT_HOME=str(tmp_path / "lerobot"),
        )
    assert told == "imported: []"


@pytest.mark.slow
def test_importing_the_package_registers_the_policy():
    assert printed_by(_REGISTERED) == "registered: True"
