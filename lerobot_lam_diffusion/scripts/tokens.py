"""Look at a token store, check it, put partial stores together, write it elsewhere or in another format.

    lerobot-lam-tokens info ./data/pusht_lam
    lerobot-lam-tokens verify ./data/pusht_lam --dataset.repo_id=lerobot/pusht --lam.path=microsoft/villa-x
    lerobot-lam-tokens report ./data/pusht_lam --dataset.repo_id=lerobot/pusht --output=report.html
    lerobot-lam-tokens view ./data/pusht_lam --dataset.repo_id=lerobot/pusht --episode=3 --save=episode_3.rrd
    lerobot-lam-tokens merge ./data/part_0 ./data/part_1 --output_dir=./data/pusht_lam
    lerobot-lam-tokens merge ./data/pusht_lam   # of an extraction whose processes finished all its shards
    lerobot-lam-tokens merge ./live --dataset.repo_id=lerobot/pusht --lam.path=./my_lam --output_dir=./store
    lerobot-lam-tokens export ./data/pusht_lam --format=parquet --output=./pusht_lam.parquet
    lerobot-lam-tokens add-column ./data/pusht_lam --dataset.repo_id=lerobot/pusht --output_dir=./pusht_col
    lerobot-lam-tokens verify ./pusht_col   # a dataset that has a column of tokens
    lerobot-lam-tokens push ./data/pusht_lam --repo_id=user/pusht-lam-tokens
    lerobot-lam-tokens pull user/pusht-lam-tokens --output_dir=./data/pusht_lam
    lerobot-lam-tokens cache list   # what lam_tokens_path=auto has built and lam_live_cache=auto has kept
    lerobot-lam-tokens cache prune --older_than_days=30   # or --all=true
    lerobot-lam-tokens cache path

A store is a folder, or a dataset repository on the Hub, `user/pusht-lam-tokens[@revision]`; where there is a
folder of that name, it is meant, and `hf://datasets/user/pusht-lam-tokens` is the Hub's.

`verify` reads every byte again; with a dataset it checks that the store was made of it, and with a LAM as
well it encodes a random sample of frame pairs and compares. A `.pt` file is verified with its dataset.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import lerobot_lam_commands
from lerobot_lam_diffusion.scripts.command_line import Command, did_you_mean, refuse, run_command
from lerobot_lam_diffusion.utils.errors import FlagError

# Module of lerobot_lam_diffusion.scripts, its config and its function; imported when the command is run.
COMMANDS = {
    "info": ("info", "InfoConfig", "info"),
    "verify": ("verify", "VerifyConfig", "verify"),
    "report": ("report", "ReportConfig", "report"),
    "view": ("view", "ViewConfig", "view"),
    "merge": ("merge", "MergeConfig", "merge"),
    "export": ("export", "ExportConfig", "export"),
    "add-column": ("column", "AddColumnConfig", "add_token_column"),
    "push": ("hub", "PushConfig", "push"),
    "pull": ("hub", "PullConfig", "pull"),
    "cache list": ("cache", "CacheListConfig", "list_cache"),
    "cache prune": ("cache", "CachePruneConfig", "prune_cache"),
    "cache path": ("cache", "CachePathConfig", "cache_path"),
}
WITHOUT_EPISODES = ("add-column", "view")
"""They refuse `--dataset.episodes`."""


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["cache"]:
        words[:2] = [" ".join(words[:2])]
    name = words.pop(0) if words else "''"
    if name not in COMMANDS:
        meant, known = did_you_mean(name, list(COMMANDS)), ", ".join(COMMANDS)
        refuse(FlagError(f"unknown command {name}{meant} Commands: {known}"))
    run_command(*subcommand(name), words)


def subcommand(name: str) -> tuple[Command, Callable[[Any], None]]:
    """A subcommand with its examples, and the function that runs it."""
    module, class_name, function = COMMANDS[name]
    imported = import_module(f"{lerobot_lam_commands.SCRIPTS}.{module}")
    config_class, run = getattr(imported, class_name), getattr(imported, function)
    begin = f"    lerobot-lam-tokens {name} "
    examples = "\n".join(line for line in (__doc__ or "").splitlines() if f"{line} ".startswith(begin))
    words = next((each for each in ("store", "stores") if each in config_class.__dataclass_fields__), "")
    hidden = ("dataset.episodes",) if name in WITHOUT_EPISODES else ()
    return Command(f"lerobot-lam-tokens {name}", config_class, examples, words, hidden), run


if __name__ == "__main__":
    lerobot_lam_commands.tokens()
