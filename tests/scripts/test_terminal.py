"""Output into terminals and pipes that are not UTF-8: what they lack is replaced, nothing stops."""

import io
import runpy
import sys

import pytest

import lerobot_lam_commands


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


@pytest.mark.parametrize("name", ["precompute", "fit", "convert", "tokens", "demo"])
def test_help(printed_by, name):
    told = printed_by(getattr(lerobot_lam_commands, name), ["--help"])
    assert told.startswith("usage: lerobot-lam-")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_a_module_that_is_run(printed_by, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["precompute_lam_tokens", "--help"])
    module = "lerobot_lam_diffusion.scripts.precompute_lam_tokens"
    assert printed_by(runpy.run_module, module, run_name="__main__").startswith("usage: lerobot-lam-")
