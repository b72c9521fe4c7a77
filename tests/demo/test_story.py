"""The demo's steps: its commands, its progress, its figures, and that it all runs."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lerobot_lam_diffusion.utils.errors import DemoError

pytest.importorskip("gym_pusht")

from lerobot_lam_diffusion.demo import commands
from lerobot_lam_diffusion.demo.running import (
    LiveLine,
    Progress,
    command_environment,
    losses,
    run_logged,
    token_progress,
    training_progress,
)
from lerobot_lam_diffusion.demo.story import Demo, Table, log_of, loss_facts, token_facts, what_next
from lerobot_lam_diffusion.scripts.next_step import shell_text

TRAIN_LOG = (
    "WARNING: torchcodec\n"
    "Training:   0%|          | 0/100 [00:00<?, ?step/s]\r"
    "Training:   1%|          | 1/100 [00:00<01:08,  1.45step/s]INFO 2026-11-22 22:05:17 ot_train.py:641 "
    "step:1 smpl:8 ep:0 epch:0.01 loss:1.268 grdn:14.020 lr:1.0e-04 updt_s:0.550 data_s:0.142 smp/s:12\n"
    "Training:   2%|▏         | 2/100 [00:01<00:57,  1.70step/s]INFO 2026-11-22 22:05:18 ot_train.py:641 "
    "step:2 smpl:16 ep:0 epch:0.02 loss:1.005 grdn:14.598 lr:2.0e-04 updt_s:0.454 data_s:0.062 smp/s:15\n"
    "Training:   3%|▎         | 3/100 [00:01<00:54,  1.79step/s]"
)


def train_command(**changes) -> list[str]:
    arguments = {
        "repo_id": "local/x",
        "root": Path("a b/pusht"),
        "episodes": range(3),
        "tokens": Path("a b/tokens"),
        "output_dir": Path("a b/train"),
        "steps": 7,
        "seed": 1,
        "device": "cpu",
    }
    return commands.train_command(**{**arguments, **changes})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- commands


def test_training_is_stock_and_holds_out_what_is_not_listed():
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


def test_a_revision_is_passed_on_only_if_there_is_one():
    command = commands.precompute_command("local/x", Path("d"), "me/lam", "v1", Path("t"), "cpu")
    assert "--lam.revision=v1" in command
    without = commands.precompute_command("local/x", Path("d"), "me/lam", None, Path("t"), "cpu")
    assert not any("revision" in word for word in without)


@pytest.mark.parametrize("kind", ["precompute", "fit"])
def test_our_own_commands_take_these_flags(kind):
    import draccus

    from lerobot_lam_diffusion.scripts import fit_lam, precompute_lam_tokens

    if kind == "precompute":
        argv = commands.precompute_command("local/x", Path("d"), "lam", "v1", Path("t"), "cpu")
        config = draccus.parse(precompute_lam_tokens.PrecomputeConfig, args=argv[1:])
    else:
        config = draccus.parse(
            fit_lam.FitLamConfig, args=commands.fit_command("local/x", Path("d"), Path("t"))[1:]
        )
    assert config.dataset.root == "d"
    assert config.output_dir == Path("t")


# --- progress


def test_losses_and_progress_are_read_from_the_log():
    assert losses(TRAIN_LOG) == [1.268, 1.005]
    assert training_progress(TRAIN_LOG) == Progress(3, 100, "steps   loss 1.005")
    assert training_progress("importing") is None
    assert token_progress(
        "LAM tokens:  40%|████ | 2/5 [00:01<\rLAM tokens:  80%|████ | 4/5 [00:02<"
    ) == Progress(4, 5, "frames")


def test_the_thousandth_step_and_a_loss_that_is_no_number_are_read():
    found = losses("step:1K smpl:8K ep:15 loss:0.1 grdn:1\nstep:1K smpl:8K ep:15 loss:nan grdn:nan\n")
    assert found[0] == 0.1
    assert found[1] != found[1]


def test_without_a_terminal_progress_is_a_line_a_quarter():
    stream = io.StringIO()
    with LiveLine(stream) as line:
        line.show(None)
        for done in range(101):
            line.show(Progress(done, 100, "steps"))
    lines = stream.getvalue().splitlines()
    assert [re.search(r"(\d+)/100 steps", text).group(1) for text in lines] == ["25", "50", "75", "100"]
    assert "\r" not in stream.getvalue()


def test_on_a_terminal_one_line_is_rewritten_and_removed_at_the_end():
    stream = Terminal()
    with LiveLine(stream) as line:
        line.show(None)
        line.show(Progress(1, 4, "steps"))
    shown = stream.getvalue()
    assert "\n" not in shown
    assert "starting" in shown
    assert "[######------------------] 1/4 steps" in shown
    assert shown.endswith("\r\033[K")


# --- running


def run_python(code: str, log: Path, seen: list[str]) -> None:
    def note(text: str) -> None:
        seen.append(text)

    run_logged([os.path.basename(sys.executable), "-c", code], log, note, LiveLine(io.StringIO()))


def test_a_command_runs_offline_into_its_log_while_progress_is_read(tmp_path):
    seen: list[str] = []
    code = "import os, time; print('at', os.environ['HF_HUB_OFFLINE'], flush=True); time.sleep(1.5)"
    run_python(code, tmp_path / "logs" / "x.log", seen)
    assert (tmp_path / "logs" / "x.log").read_text() == "at 1\n"
    assert "at 1\n" in seen


def test_a_failed_command_is_told_with_the_end_of_its_log(tmp_path):
    with pytest.raises(DemoError, match=r"(?s)status 3; its full output is in .*x\.log.*-c.*\| the reason"):
        run_python("print('the reason'); raise SystemExit(3)", tmp_path / "x.log", [])


def test_a_command_that_is_not_installed_is_told(tmp_path):
    with pytest.raises(DemoError, match="no-such-program is not beside"):
        run_logged(["no-such-program"], tmp_path / "x.log", lambda log: None, LiveLine(io.StringIO()))


def test_the_commands_of_this_environment_come_first():
    assert command_environment()["PATH"].startswith(f"{Path(sys.executable).parent}{os.pathsep}")


# --- figures


def test_token_facts_count_and_compare(store):
    first, codes, size = token_facts(store)
    assert first == "55 tokens of 64 numbers; 5 first frames have none"
    assert re.fullmatch(r"perplexity [\d.]+, [\d.]+ of 16 codes a slot", codes)
    assert "2 a frame" in size
    assert "as float32 15,360 (256 a frame)" in size


def test_loss_facts_compare_start_and_end():
    assert loss_facts([2.0] * 10 + [9.0] * 5 + [0.5] * 10).startswith("25 steps, loss 2.000 -> 0.500")
    assert loss_facts([1.0]) == "1 steps, loss 1.000 -> 1.000 (means of the first and last 1)"


def test_the_table_lines_up_and_adds_the_seconds():
    table = Table()
    table.add("dataset", "20 episodes", 19.4)
    table.add("", "0.5 MB")
    table.add("policy", "100 steps", 60.0)
    lines = str(table).splitlines()
    assert lines[1].endswith(" 19 s")
    assert lines[2] == "             0.5 MB"
    assert lines[-1].split() == ["all", "steps", "79", "s"]
    assert len(lines[1]) == len(lines[-1]) == len(lines[0])


def test_the_demo_lays_everything_into_its_folder():
    demo = Demo(Path("o"), 5, 0, 10, 0, "lam", None, "cpu")
    assert demo.held_out == 4
    assert log_of(demo.training) == Path("o/train.log")
    text = what_next(demo)
    assert "lerobot-lam-tokens info o/tokens" in text
    assert "--policy.lam_tokens_path=data/my_tokens" in text


# --- the whole


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    """`configs/demo.yaml` as it is."""

    def run() -> subprocess.CompletedProcess:
        program = Path(sys.executable).parent / "lerobot-lam-demo"
        config = Path(__file__).parents[2] / "configs" / "demo.yaml"
        return subprocess.run(
            [program, f"--config_path={config}"], cwd=tmp_path, capture_output=True, text=True, timeout=550
        )

    result = run()
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "outputs" / "small_demo"
    assert (folder / "lam_demo.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "train/checkpoints/last/pretrained_model/model.safetensors").exists()
    assert "[4/4]" in result.stdout
    assert "40 steps, loss" in result.stdout
    assert len(losses((folder / "train.log").read_text())) == 40
    console = result.stdout + result.stderr
    assert "Traceback" not in console
    assert "Svt" not in console
    assert "\r" not in console
    assert len(console.splitlines()) < 90
