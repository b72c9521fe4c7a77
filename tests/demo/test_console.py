"""`output_to` catches what goes round Python's own streams, and gives everything back afterwards."""

import os
import subprocess

import pytest

from lerobot_lam_diffusion.demo.console import output_to


def test_output_of_c_code_and_children_goes_to_the_log_and_progress_to_the_console(tmp_path, capfd):
    log = tmp_path / "logs" / "step.log"
    with output_to(log) as terminal:
        os.write(1, b"out\n")
        os.write(2, b"err\n")
        subprocess.run(["echo", "child"], check=True)
        print("progress", file=terminal)
    os.write(1, b"after\n")
    os.write(2, b"after err\n")
    captured = capfd.readouterr()
    assert captured.out == "progress\nafter\n"
    assert captured.err == "after err\n"
    assert log.read_text() == "out\nerr\nchild\n"


def test_logs_are_appended(tmp_path):
    for word in (b"one\n", b"two\n"):
        with output_to(tmp_path / "step.log"):
            os.write(1, word)
    assert (tmp_path / "step.log").read_text() == "one\ntwo\n"


def test_an_error_names_the_log_and_gives_the_console_back(tmp_path, capfd):
    with pytest.raises(KeyError) as caught, output_to(tmp_path / "step.log"):
        raise KeyError("x")
    assert caught.value.__notes__ == [f"The full output is in {tmp_path / 'step.log'}"]
    os.write(1, b"back\n")
    assert capfd.readouterr().out == "back\n"
