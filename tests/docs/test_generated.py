"""docs/REFERENCE.md and the texts of `--help` are what the code says."""

import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

from lerobot_lam_diffusion import DiffusionLamConfig
from lerobot_lam_diffusion.lam.fit.recipe import PRESETS
from lerobot_lam_diffusion.scripts import tokens
from lerobot_lam_diffusion.tokens.export import FORMATS
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS_STORAGE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate():
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generated(generate) -> dict[str, str]:
    return generate.generated()


def test_what_is_generated_is_not_stale(generated):
    folder = ROOT / "lerobot_lam_diffusion" / "scripts" / "help_texts"
    present = {str(path.relative_to(ROOT)) for path in folder.iterdir()} | {"docs/REFERENCE.md"}
    stale = {
        path for path in present & generated.keys() if (ROOT / path).read_text("utf-8") != generated[path]
    }
    stale |= present ^ generated.keys()
    assert not stale, (
        f"these are stale, run `make docs` and commit what it writes: {', '.join(sorted(stale))}"
    )


def test_every_flag_and_every_policy_field_is_explained(generate):
    stock = {each.name for each in fields(DiffusionConfig)}
    told = {generate.fields_help(DiffusionLamConfig, "policy."): fields(DiffusionLamConfig)}
    told |= {generate.help_of(command): fields(command.config_class) for command in generate.COMMANDS}
    missing = [
        each.name
        for text, those in told.items()
        for each in those
        if each.name not in stock and not re.search(rf"--(policy\.)?{each.name}\b", text)
    ]
    assert missing == [], "give these an entry in the docstring of their dataclass"


CHOICES = {
    "lerobot-lam-fit": tuple(PRESETS),
    "lerobot-lam-precompute": (*CONTINUOUS_STORAGE, "fail", "skip", "pyav"),
    "lerobot-lam-tokens export": tuple(FORMATS),
}


@pytest.mark.parametrize(("name", "choices"), CHOICES.items(), ids=CHOICES)
def test_help_names_the_choices(generate, name, choices):
    (text,) = (generate.help_of(command) for command in generate.COMMANDS if command.name == name)
    assert [choice for choice in choices if choice not in text] == []


@pytest.mark.parametrize("name", ["precompute", "fit", "convert", "tokens", "demo"])
def test_the_console_scripts_are_installed(name):
    (script,) = entry_points(group="console_scripts", name=f"lerobot-lam-{name}")
    assert script.value == f"lerobot_lam_commands:{name}"


def test_help_does_not_wait_for_lerobot():
    code = """import lerobot_lam_commands as commands, sys
commands.tokens(["verify", "./store", "--help"])
commands.tokens(["-h"])
try:
    commands.tokens([])
except SystemExit as stop:
    assert stop.code == 2
assert "lerobot" not in sys.modules and "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: lerobot-lam-tokens verify STORE [flags]\n")
    assert "    cache prune   Remove" in done.stdout


def test_an_interrupt_of_the_imports_has_no_traceback(monkeypatch, capsys):
    import lerobot_lam_commands

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(lerobot_lam_commands, "import_module", interrupted)
    with pytest.raises(SystemExit) as stop:
        lerobot_lam_commands.tokens(["info", "./store"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_other_words_reach_the_command(monkeypatch):
    import lerobot_lam_commands

    seen = []
    monkeypatch.setattr(tokens, "main", seen.append)
    lerobot_lam_commands.tokens(["info", "./store"])
    assert seen == [["info", "./store"]]
