"""Output into terminals and pipes that are not UTF-8: what they lack is replaced, nothing stops."""

import io
import runpy
import sys

import pytest

import lerobot_lam_commands
from lerobot_lam_diffusion.demo.running import LiveLine, run_logged

COMMANDS = ("precompute", "fit", "tokens", "demo")
MODULES = ("precompute_lam_tokens", "fit_lam", "tokens", "demo")


@pytest.fixture(params=["ascii", "latin-1", "cp1252"])
def printed_by(request, monkeypatch):
    """`printed_by(command, …)`: what a call prints into a terminal of that encoding."""

    def run(command, *arguments, **options) -> str:
        received = io.BytesIO()
        stream = io.TextIOWrapper(received, encoding=request.param)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            command(*arguments, **options)
        stream.flush()
        return received.getvalue().decode(request.param)

    return run


def test_what_a_command_prints(printed_by, store):
    assert str(store.path) in printed_by(lerobot_lam_commands.tokens, ["info", str(store.path)])


@pytest.mark.parametrize("name", COMMANDS)
def test_help(printed_by, name):
    told = printed_by(getattr(lerobot_lam_commands, name), ["--help"])
    assert told.startswith("usage: lerobot-lam-")


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_a_module_that_is_run(printed_by, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    module = f"lerobot_lam_diffusion.scripts.{name}"
    assert printed_by(runpy.run_module, module, run_name="__main__").startswith("usage: lerobot-lam-")


def test_the_demo_reads_its_commands_whatever_the_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    log = tmp_path / "log"
    run_logged([sys.executable, "-c", "print('π → a')"], log, lambda _: None, LiveLine(io.StringIO()))
    assert log.read_text("utf-8") == "π → a\n"
