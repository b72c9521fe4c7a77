"""What is generated of the docs (`make docs`): REFERENCE.md, and the text files that `--help` shows.

tests/docs/test_generated.py fails where they are not what this writes.
"""

from pathlib import Path

from lerobot_lam_diffusion import DiffusionLamConfig
from lerobot_lam_diffusion.scripts import convert_lam, demo, fit_lam, precompute_lam_tokens, tokens
from lerobot_lam_diffusion.scripts.help import fields_help

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

A flag without a default that is not required is found out, or decided, as its text says.
[configs/](../configs) has YAML files for `--config_path`, to start from.
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
    parts = [HEAD, POLICY, fenced(fields_help(DiffusionLamConfig, "policy.")), "## Commands\n"]
    for command in COMMANDS:
        parts += [f"### {command.name}\n", fenced(command.help())]
    return "\n".join(parts)


def fenced(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"


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
