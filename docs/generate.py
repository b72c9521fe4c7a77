"""What is generated of the docs (`make docs`): REFERENCE.md, and the text files that `--help` shows.

tests/docs/test_generated.py fails where they are not what this writes.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

from lerobot_lam_diffusion import DiffusionLamConfig
from lerobot_lam_diffusion.scripts import convert_lam, demo, fit_lam, precompute_lam_tokens, tokens
from lerobot_lam_diffusion.scripts.help import Command, Flag, flags_of, summary_of

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "docs/REFERENCE.md"
HELP_TEXTS = "lerobot_lam_diffusion/scripts/help_texts"

COMMANDS = [
    precompute_lam_tokens.COMMAND,
    fit_lam.COMMAND,
    convert_lam.COMMAND,
    *(tokens.command_of(name) for name in tokens.COMMANDS),
    demo.COMMAND,
]

HEAD = """# Reference

Generated from the code by `make docs`: the fields of the policy and the flags of the commands. What they are
for is explained in [PRECOMPUTED_LAM_TOKENS.md](PRECOMPUTED_LAM_TOKENS.md), what can go wrong in
[TROUBLESHOOTING.md](TROUBLESHOOTING.md).

`unset` by default: it is found out, or decided, as the text says. Every command takes `--help`, and
`--config_path=FILE`, a YAML file that holds flags (those of the command line win): [configs/](../configs) has
some to start from.
"""

POLICY = """## Policy fields

Of `--policy.type=diffusion_lam`, as `--policy.NAME=VALUE` on the command lines of LeRobot and as arguments of
`DiffusionLamConfig`. Those of LeRobot's `DiffusionConfig` keep their meaning and are not repeated here.
"""


def generated() -> dict[str, str]:
    """Path in the repository → content."""
    texts = {f"{HELP_TEXTS}/{command.name.replace(' ', '-')}.txt": command.help() for command in COMMANDS}
    texts[f"{HELP_TEXTS}/lerobot-lam-tokens-cache.txt"] = f"{tokens.command_list('cache ')}\n"
    texts[f"{HELP_TEXTS}/lerobot-lam-tokens.txt"] = f"{tokens.command_list()}\n"
    return {REFERENCE: reference(), **texts}


def reference() -> str:
    stock = {each.name for each in fields(DiffusionConfig)}
    ours = [each.name for each in fields(DiffusionLamConfig) if each.name not in stock]
    parts = [
        HEAD,
        POLICY,
        table("field", flags_of(DiffusionLamConfig, ours), lambda field: f"`{field.name}`"),
        "## Commands\n",
    ]
    for command in COMMANDS:
        parts += [
            f"### {command.name}\n",
            f"{summary_of(command.config_class)}\n",
            f"```\n{command.usage()}\n```\n",
        ]
        for group in command.groups():
            title = f"**{group.title}**" + (f": {group.about}" if group.about else "")
            parts += [f"{title}\n", table("flag", group.flags, partial(_spelled, command))]
    return "\n".join(parts)


def table(kind: str, flags: list[Flag], spelled: Callable[[Flag], str]) -> str:
    rows = [
        f"| {spelled(flag)} | `{_cell(flag.type_name)}` | {_default(flag)} | {_cell(flag.text)} |"
        for flag in flags
    ]
    return "\n".join([f"| {kind} | type | default | |", "|---|---|---|---|", *rows, ""])


def _spelled(command: Command, flag: Flag) -> str:
    return " or ".join(f"`{word}`" for word in command.spelled(flag))


def _default(flag: Flag) -> str:
    if flag.required:
        return "required"
    return f"`{_cell(flag.default)}`" if flag.default else "unset"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    texts = generated()
    for stale in (ROOT / HELP_TEXTS).glob("*.txt"):
        if f"{HELP_TEXTS}/{stale.name}" not in texts:
            stale.unlink()
    for path, text in texts.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
