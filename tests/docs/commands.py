"""The commands of the docs, parsed by the parsers that would parse them: nothing runs, nothing is looked up.

Conventions of a ```bash block: `…` as a word of its own stands for the flags that `ELIDED` has for that
command, `$NAME` for a number, and what follows `#` is a comment.
"""

import ast
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import draccus
from accelerate.commands.launch import launch_command_parser
from lerobot.configs import parser
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.scripts.lerobot_edit_dataset import EditDatasetConfig
from lerobot.scripts.lerobot_rollout import RolloutConfig
from torch.distributed.run import get_args_parser

from lerobot_lam_diffusion import DiffusionLamConfig
from lerobot_lam_diffusion.scripts import convert_lam, demo, fit_lam, precompute_lam_tokens, tokens
from lerobot_lam_diffusion.scripts.command_line import DASHED, SWITCHES, Command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULE = "lerobot_lam_diffusion.scripts."
ELIDED = {
    "lerobot-lam-precompute": "--dataset.repo_id=user/data --lam.path=user/lam --output_dir=data/lam",
    "lerobot-train": "--policy.type=diffusion_lam --dataset.repo_id=user/data --policy.push_to_hub=false",
}
INSTALLED = ("lerobot_policy_diffusion_lam", "lerobot", ".")


def blocks(page: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """The ```bash blocks of a page: where each is, and its commands as words."""
    text = page.read_text("utf-8")
    for block in re.finditer(r"^```bash\n(.*?)^```", text, re.M | re.S):
        line = text.count("\n", 0, block.start()) + 1
        yield f"{page.relative_to(ROOT)}:{line}", commands_in(block[1])


def commands_in(text: str) -> list[list[str]]:
    """One list of words for each command."""
    text = re.sub(r"\$\(which ([\w-]+)\)", r"\1", text.replace("\\\n", " "))
    text = re.sub(r"\$\{?\w+\}?", "0", text)
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in commands if words]


def config_comment(path: Path) -> list[list[str]]:
    """The commands in the comment at the beginning of a file of configs/."""
    begin = re.match(r"(#.*\n)+", path.read_text("utf-8"))
    lines = [line[2:] for line in begin[0].splitlines()] if begin else []
    return commands_in("\n".join(line for line in lines if line.startswith("  ")))


def parse(words: list[str], checkpoint: Path) -> object:
    """Parse one command; the config that it makes, where it makes one.

    Args:
        checkpoint: Folder with the config of a `diffusion_lam` policy; stands for what --policy.path names.

    Raises:
        SystemExit, AssertionError, Exception: the command would be refused.
    """
    name, *rest = words
    if name in ELIDED:
        rest = [flag for word in rest for flag in (ELIDED[name].split() if word == "…" else [word])]
    rest = [f"--policy.path={checkpoint}" if word.startswith("--policy.path=") else word for word in rest]
    assert name in PARSERS, f"{name} is a command that tests/docs/commands.py knows no parser of"
    return PARSERS[name](rest)


def _by_lerobot(config_class: type) -> Callable[[list[str]], object]:
    """LeRobot's own way, which reads the command line of the process, also later."""

    def checked(config):
        if config_class is TrainPipelineConfig:
            config.validate()
        return config

    checked.__annotations__["config"] = config_class  # what `wrap` parses into

    def parsed(words: list[str]) -> object:
        before, sys.argv = sys.argv, ["lerobot", *words]
        try:
            return parser.wrap()(checked)()
        finally:
            sys.argv = before

    return parsed


def _tokens(words: list[str]) -> object:
    name = " ".join(words[:2]) if words[:1] == ["cache"] else words[0]
    assert name in tokens.COMMANDS, f"lerobot-lam-tokens has no command {name}"
    return _ours(tokens.subcommand(name)[0])(words[len(name.split()) :])


def _ours(command: Command) -> Callable[[list[str]], object]:
    return lambda words: draccus.parse(command.config_class, args=command.arguments(words))


def _torchrun(words: list[str]) -> object:
    found = get_args_parser().parse_args(words)
    return _started([found.training_script, *found.training_script_args], found.module)


def _accelerate(words: list[str]) -> object:
    assert words[0] == "launch", f"accelerate {words[0]}"
    found = launch_command_parser().parse_args(words[1:])
    return _started([found.training_script, *found.training_script_args], found.module)


def _python(words: list[str]) -> object:
    if words[0] == "-c":
        return compile(words[1], "<python -c>", "exec")
    return _started(words[1:], True) if words[0] == "-m" else _started(words, False)


def _started(words: list[str], is_module: bool) -> object:
    """A console script, a module of ours, or a script of the repository, whose flags argparse declares."""
    name, *rest = words
    if is_module:
        assert name.startswith(MODULE), f"{name} is no module of {MODULE}"
        return parse([MODULES[name.removeprefix(MODULE)], *rest], Path())
    if name in PARSERS:
        return parse([name, *rest], Path())
    unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - script_flags(ROOT / name)
    assert not unknown, f"{name} has no flags {', '.join(sorted(unknown))}"
    return None


def script_flags(path: Path) -> set[str]:
    """The flags that a script adds to its argparse parser."""
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    added = [call.args[0] for call in calls if ast.unparse(call.func).endswith(".add_argument")]
    return {arg.value for arg in added if isinstance(arg, ast.Constant)}


def _make(words: list[str]) -> object:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    unknown = [word for word in words if "=" not in word and word not in targets]
    assert not unknown, f"the Makefile has no targets {unknown}"
    return None


def _pip(words: list[str]) -> object:
    assert words[0] == "install", words
    packages = [re.split(r"[\[<>=]", word)[0] for word in words[1:] if not word.startswith("-")]
    assert set(packages) <= set(INSTALLED), packages
    return None


def _nothing_to_check(words: list[str]) -> object:
    return None


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "lerobot-lam-precompute": _ours(precompute_lam_tokens.COMMAND),
    "lerobot-lam-fit": _ours(fit_lam.COMMAND),
    "lerobot-lam-convert": _ours(convert_lam.COMMAND),
    "lerobot-lam-demo": _ours(demo.COMMAND),
    "lerobot-lam-tokens": _tokens,
    "lerobot-train": _by_lerobot(TrainPipelineConfig),
    "lerobot-eval": _by_lerobot(EvalPipelineConfig),
    "lerobot-rollout": _by_lerobot(RolloutConfig),
    "lerobot-edit-dataset": _by_lerobot(EditDatasetConfig),
    "torchrun": _torchrun,
    "accelerate": _accelerate,
    "python": _python,
    "make": _make,
    "pip": _pip,
    "source": _nothing_to_check,
    "git": _nothing_to_check,
    "cd": _nothing_to_check,
    "export": _nothing_to_check,
}
MODULES = {
    "precompute_lam_tokens": "lerobot-lam-precompute",
    "fit_lam": "lerobot-lam-fit",
    "convert_lam": "lerobot-lam-convert",
    "tokens": "lerobot-lam-tokens",
    "demo": "lerobot-lam-demo",
}


def known_flags() -> set[str]:
    """Every flag that any of these commands has, for what the text mentions outside of blocks."""
    classes = [
        TrainPipelineConfig,
        EvalPipelineConfig,
        EditDatasetConfig,
        precompute_lam_tokens.PrecomputeConfig,
        fit_lam.FitLamConfig,
        convert_lam.ConvertConfig,
        demo.DemoConfig,
        *(tokens.subcommand(name)[0].config_class for name in tokens.COMMANDS),
    ]
    parsers = [draccus.argparsing.ArgumentParser(each).parser for each in classes]
    flags = {flag for each in (*parsers, get_args_parser()) for flag in each._option_string_actions}
    scripts = [*(ROOT / "tests" / "benchmarks").rglob("*.py"), *(ROOT / "docs").rglob("*.py")]
    flags |= {flag for path in scripts for flag in script_flags(path)}
    return flags | {flag.replace("_", "-") for flag in flags} | set(DASHED) | set(SWITCHES)


def mentioned_flags(page: Path) -> set[str]:
    """Flags in the text of a page outside of its blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", text)
    return {
        flag
        for span in spans
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*(?:\.[a-z0-9_]+)*\b", span)
    }


def stand_in_checkpoint(folder: Path) -> Path:
    """The folder of a checkpoint that has a config and nothing else; a video may guide it."""
    folder.mkdir()
    config = DiffusionLamConfig(
        use_precomputed_lam_tokens=True, push_to_hub=False, lam_token_offsets=[0, 1], lam_token_dropout=0.5
    )
    config._save_pretrained(folder)
    return folder
