"""The console scripts, and where `python -m` of their modules begins.

Importing LeRobot takes many times as long as reading a token store. So `--help` is answered out of a text
file, which `make docs` writes, and `lerobot-lam-tokens` imports the package without registering its policy;
what it needs of LeRobot, it imports when there is a dataset to open. This module lies beside the package, as
`lerobot_policy_diffusion_lam.py` does, because importing anything inside the package imports the package.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

SCRIPTS = "lerobot_lam_diffusion.scripts"

registers_policy = True
"""Whether importing `lerobot_lam_diffusion` registers its policy with LeRobot."""


def precompute(argv: Sequence[str] | None = None) -> None:
    _run("lerobot-lam-precompute", "precompute_lam_tokens", argv)


def fit(argv: Sequence[str] | None = None) -> None:
    _run("lerobot-lam-fit", "fit_lam", argv)


def convert(argv: Sequence[str] | None = None) -> None:
    _run("lerobot-lam-convert", "convert_lam", argv)


def tokens(argv: Sequence[str] | None = None) -> None:
    global registers_policy
    registers_policy = False
    _run("lerobot-lam-tokens", "tokens", argv)


def demo(argv: Sequence[str] | None = None) -> None:
    _run("lerobot-lam-demo", "demo", argv)


def _run(command: str, module: str, argv: Sequence[str] | None) -> None:
    _tolerate_encoding()
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words or (command == "lerobot-lam-tokens" and not words):
        text = _help_of([command, *words])
        if text is not None:
            print(text, end="")
            if not words:
                sys.exit(2)
            return
    try:
        main = import_module(f"{SCRIPTS}.{module}").main
    except KeyboardInterrupt:  # imports take seconds
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    main(words)


def _tolerate_encoding() -> None:
    """Print `?` for what the encoding of a terminal or pipe lacks, instead of stopping with an error."""
    if isinstance(sys.stdout, TextIOWrapper):  # standard error escapes such characters already
        sys.stdout.reconfigure(errors="replace")


def _help_of(words: list[str]) -> str | None:
    """The text of the longest subcommand that the words begin with."""
    spec = find_spec("lerobot_lam_diffusion")  # finds the package, and does not import it
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "scripts" / "help_texts"
    files = [folder / f"{'-'.join(words[:count])}.txt" for count in (3, 2, 1)]
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)
