"""The demo's steps: its commands, its figures, and that it all runs."""

import shlex
import subprocess
import sys
from pathlib import Path

import draccus
import pytest

from lerobot_lam_diffusion.scripts import fit_lam, precompute_lam_tokens
from lerobot_lam_diffusion.scripts.command_line import LamFlags
from lerobot_lam_diffusion.scripts.demo import DemoConfig
from lerobot_lam_diffusion.scripts.next_step import shell_text
from lerobot_lam_diffusion.utils.errors import DemoError
from tests.docs.commands import commands_in

pytest.importorskip("gym_pusht")

from lerobot_lam_diffusion.demo import story

TRAIN_LOG = (
    "WARNING: torchcodec\n"
    "Training:   0%|          | 0/100 [00:00<?, ?step/s]\r"
    "Training:   1%|          | 1/100 [00:00<01:08,  1.45step/s]INFO 2026-11-22 22:05:17 ot_train.py:641 "
    "step:1 smpl:8 ep:0 epch:0.01 loss:1.268 grdn:14.020 lr:1.0e-04 updt_s:0.550 data_s:0.142 smp/s:12\n"
    "Training:   2%|▏         | 2/100 [00:01<00:57,  1.70step/s]INFO 2026-11-22 22:05:18 ot_train.py:641 "
    "step:2 smpl:16 ep:0 epch:0.02 loss:1.005 grdn:14.598 lr:2.0e-04 updt_s:0.454 data_s:0.062 smp/s:15\n"
    "Training:   3%|▎         | 3/100 [00:01<00:54,  1.79step/s]"
)


def train_command() -> list[str]:
    config = DemoConfig(num_episodes=4, steps=7, seed=1)
    return story.train_command(config, Path("a b/pusht"), Path("a b/tokens"), Path("a b/train"))


def test_training_is_stock_and_holds_out_the_last_episode():
    argv = train_command()
    assert argv[0] == "lerobot-train"
    assert {"--dataset.episodes=[0,1,2]", "--steps=7", "--save_freq=7", "--seed=1"} <= set(argv)
    assert {"--policy.type=diffusion_lam", "--policy.lam_tokens_path=a b/tokens"} <= set(argv)


def test_the_shell_reads_the_printed_command_as_the_one_that_runs():
    argv = train_command()
    text = shell_text(argv)
    assert shlex.split(text.replace("\\\n", "")) == argv
    assert max(map(len, text.splitlines())) <= 104
    assert all(line.endswith(" \\") for line in text.splitlines()[:-1])


@pytest.mark.parametrize("revision", [None, "v1"])
def test_the_precomputation_is_one_of_our_own(revision):
    demo = DemoConfig(lam=LamFlags("me/lam", revision))
    argv = story.precompute_command(demo, Path("d"), Path("t"))
    config = draccus.parse(precompute_lam_tokens.PrecomputeConfig, args=argv[1:])
    assert config.dataset.root == "d"
    assert config.output_dir == Path("t")
    assert config.lam == demo.lam


def test_what_comes_next_is_accepted():
    text = "\n".join(
        line for line in story.what_next(DemoConfig(), Path("o")).splitlines() if line[:1] == " "
    )
    info, fit, precompute = commands_in(text)
    assert info == ["lerobot-lam-tokens", "info", "o/tokens"]
    assert draccus.parse(fit_lam.FitLamConfig, args=fit[1:]).dataset.root == "o/pusht"
    assert draccus.parse(precompute_lam_tokens.PrecomputeConfig, args=precompute[1:]).frame_stride == 3


def test_losses_are_read_from_the_log():
    assert story.losses_of(TRAIN_LOG) == [1.268, 1.005]
    with pytest.raises(DemoError, match="logged no loss"):
        story.losses_of("importing")


def test_the_thousandth_step_and_a_loss_that_is_no_number_are_read():
    found = story.losses_of(
        "step:1K smpl:8K ep:15 loss:0.1 grdn:1\nstep:1K smpl:8K ep:15 loss:nan grdn:nan\n"
    )
    assert found[0] == 0.1
    assert found[1] != found[1]


def test_loss_facts_compare_start_and_end():
    facts = story.loss_facts([2.0] * 10 + [9.0] * 5 + [0.5] * 10)
    assert facts.startswith("25 steps, loss 2.000 -> 0.500")
    assert story.loss_facts([1.0]) == "1 steps, loss 1.000 -> 1.000 (means of the first and last 1)"


@pytest.mark.parametrize("log_name", [None, "x.log"])
def test_a_failed_step_shows_what_it_said(log_name, tmp_path, capfd):
    log = None if log_name is None else tmp_path / log_name
    code = "import sys; print('the reason', file=sys.stderr); sys.exit(3)"
    with pytest.raises(DemoError, match="status 3"):
        story.run([Path(sys.executable).name, "-c", code], log)  # by its name: this environment's comes first
    assert "the reason" in capfd.readouterr().err


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    """`configs/demo.yaml` as it is."""
    program = Path(sys.executable).parent / "lerobot-lam-demo"
    config = Path(__file__).parents[2] / "configs" / "demo.yaml"
    result = subprocess.run(
        [program, f"--config_path={config}"], cwd=tmp_path, capture_output=True, text=True, timeout=550
    )
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "outputs" / "small_demo"
    assert (folder / "lam_demo.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "train/checkpoints/last/pretrained_model/model.safetensors").exists()
    assert [f"[{number}/4]" in result.stdout for number in (1, 2, 3, 4)] == [True] * 4
    assert "40 steps, loss" in result.stdout
    assert len(story.losses_of((folder / "train.log").read_text())) == 40
    console = result.stdout + result.stderr
    assert "Traceback" not in console
    assert "Svt" not in console
    assert len(result.stdout.splitlines()) < 110
