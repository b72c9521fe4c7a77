"""Every command in the README and the docs is one that would be accepted; the main story runs as written."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lerobot.scripts import lerobot_edit_dataset, lerobot_eval
from lerobot.utils.constants import HF_LEROBOT_HOME

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.scripts import demo, fit_lam, precompute_lam_tokens, tokens
from tests.conftest import record_dataset
from tests.docs.commands import (
    MODULE,
    PAGES,
    ROOT,
    blocks,
    config_comment,
    known_flags,
    mentioned_flags,
    parse,
    stand_in_checkpoint,
)
from tests.test_lerobot_train import train

PRECOMPUTE = "precompute_lam_tokens"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CLUSTERS = ("slurm", "ray")
"""Configs that need a cluster."""

OTHERS_FLAGS = {
    "--policy.path", "--env", "--force-reinstall", "--no-deps", "--cpu", "--cpus-per-task", "--gres",
    "--array",
}  # fmt: skip
"""Those that no parser declares: LeRobot's paths; flags of pip, accelerate and SLURM."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return stand_in_checkpoint(tmp_path_factory.mktemp("checkpoint") / "pretrained_model")


@pytest.fixture
def at_the_root(monkeypatch):
    """Paths of the docs are those of the repository."""
    monkeypatch.chdir(ROOT)


# --- parsed


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_accepted(page, checkpoint, at_the_root, capsys):
    refused = []
    for place, commands in blocks(page):
        for words in commands:
            try:
                parse(words, checkpoint)
            except (Exception, SystemExit) as error:
                told = [str(error), *capsys.readouterr().err.splitlines()[-1:]]
                refused.append(f"{place}: {' '.join(words)}\n    {' '.join(told)}")
    assert not refused, "\n".join(refused)


@pytest.mark.slow
def test_every_flag_that_the_text_mentions_exists():
    known = known_flags() | OTHERS_FLAGS
    found = {page.name: mentioned_flags(page) for page in PAGES}
    assert len(set().union(*found.values())) > 30
    unknown = {f"{name}: {flag}" for name, flags in found.items() for flag in flags - known}
    assert not unknown, f"no command has these flags: {sorted(unknown)}"


# --- configs


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_begins_with_its_command_and_is_accepted(path, checkpoint, at_the_root):
    commands = config_comment(path)
    flag = f"--config_path=configs/{path.name}"
    assert any(flag in words for words in commands), (
        f"{path.name} begins with the command that uses it: {flag}"
    )
    for words in commands:
        assert parse(words, checkpoint) is not None


# --- executed

OFFLINE = {"microsoft/villa-x": "pusht-compact"}
"""What stands for a LAM of the Hub."""

CAMERAS = {
    "lerobot/aloha_static_coffee": ["observation.images.cam_high", "observation.images.cam_low"],
    "user/so101_pick": ["observation.images.front"],
    "user/data": ["observation.images.top"],
}
"""Datasets of the Hub for which small ones with these cameras stand; for lerobot/pusht two demonstrations of
the demo's expert do."""

SHORT = {
    "lerobot-lam-precompute": ["--device=cpu", "--compile=false"],
    "lerobot-lam-tokens": [],
    "lerobot-lam-demo": [],
    "lerobot-edit-dataset": [],
    "lerobot-train": [
        "--steps=2", "--save_freq=2", "--batch_size=4", "--num_workers=0", "--policy.device=cpu",
        "--policy.pretrained_backbone_weights=null", "--policy.down_dims=[16,32]", "--policy.n_groups=4",
        "--policy.horizon=8", "--policy.n_action_steps=4", "--policy.drop_n_last_frames=3",
    ],
    "lerobot-eval": [
        "--policy.device=cpu", "--policy.num_inference_steps=2", "--env.episode_length=12",
        "--eval.n_episodes=1", "--eval.batch_size=1", "--eval.use_async_envs=false",
    ],
}  # fmt: skip
"""Flags that are added so that a run takes seconds."""

NOT_HERE = {"merge", "push", "pull", "…", "lerobot-rollout"}
"""Commands that need partial stores or the Hub (tests/scripts runs them) or a robot, and those that are not
written out."""


@pytest.fixture
def execute(monkeypatch, pusht, tmp_path):
    """Runs a command of the docs in this process and in an empty folder."""
    for repo_id in ("lerobot/pusht", *CAMERAS):
        stand_in = HF_LEROBOT_HOME / repo_id
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        if repo_id in CAMERAS and not stand_in.exists():
            record_dataset(stand_in, cameras=CAMERAS[repo_id])
        elif not stand_in.exists():
            stand_in.symlink_to(pusht.root)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)

    def by_lerobot(main: Callable[[], None]) -> Callable[[list[str]], None]:
        def run(words: list[str]) -> None:
            monkeypatch.setattr(sys, "argv", ["lerobot", *words])
            main()

        return run

    run = {
        "lerobot-lam-precompute": precompute_lam_tokens.main,
        "lerobot-lam-tokens": tokens.main,
        "lerobot-lam-demo": demo.main,
        "lerobot-train": lambda words: train(monkeypatch, *words),
        "lerobot-eval": by_lerobot(lerobot_eval.main),
        "lerobot-edit-dataset": by_lerobot(lerobot_edit_dataset.main),
    }

    def execute(words: list[str], *more: str) -> None:
        words = ["lerobot-lam-precompute" if word == MODULE + PRECOMPUTE else word for word in words]
        begin = next(number for number, word in enumerate(words) if word in run)  # after torchrun, accelerate
        name, *rest = words[begin:]
        for ours, offline in OFFLINE.items():
            rest = [word.replace(ours, offline) for word in rest]
        done.append(words)
        run[name]([*rest, *SHORT[name], *more])

    done: list[list[str]] = []
    return execute, done


def block_with(page: str, command: str) -> list[list[str]]:
    """The commands of the first block of a page that has this command."""
    found = (commands for _, commands in blocks(ROOT / page))
    return next(commands for commands in found if any(words[0] == command for words in commands))


@pytest.mark.slow
def test_the_readmes_story_and_the_guides_commands_on_its_store(execute, capsys, tmp_path):
    pytest.importorskip("gym_pusht")
    story = block_with("README.md", "lerobot-lam-precompute")
    assert [words[0] for words in story] == ["lerobot-lam-precompute", "lerobot-train", "lerobot-eval"]
    run, done = execute
    for words in story:
        run(words)
    told = capsys.readouterr().out
    assert re.search(r"Train on it.*:\n  lerobot-train .* --dataset.repo_id=lerobot/pusht", told)
    assert (tmp_path / "outputs" / "pusht_lam" / "checkpoints" / "last").exists()

    tokens.main(["export", "./data/pusht_lam", "--format=pt", "--output=pusht_lam.pt"])  # the guide has one
    for _, commands in blocks(ROOT / "docs" / "PRECOMPUTED_LAM_TOKENS.md"):
        for words in commands:
            shows_a_video = any(word.startswith(("--videos=", "--policy.lam_guidance=")) for word in words)
            if shows_a_video:  # tests/test_lerobot_eval.py has them, with a video
                continue
            if words[0].startswith("lerobot-") and not NOT_HERE & set(words[:2]) and words not in done:
                run(words)
    assert len(done) >= 12
    told = capsys.readouterr().out
    assert "sampled tokens agree with the LAM" in told
    assert (tmp_path / "pusht_lam.parquet").exists()
    assert (tmp_path / "data" / "pusht_plain" / "meta" / "info.json").exists()


@pytest.mark.slow
def test_the_readmes_story_offline(execute, tmp_path):
    pytest.importorskip("gym_pusht")
    story = [
        words for words in block_with("README.md", "lerobot-lam-demo") if words[0].startswith("lerobot-")
    ]
    names = ["lerobot-lam-demo", "lerobot-lam-precompute", "lerobot-train", "lerobot-eval"]
    assert [words[0] for words in story] == names
    run, _ = execute
    for words in story:
        run(words, *(["--num_episodes=2"] if words[0] == "lerobot-lam-demo" else []))
    assert list(tmp_path.glob("outputs/eval/**/eval_info.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "tokens_stay"), [("fit_pusht_compact", False), ("refine_pusht_compact", True)]
)
def test_the_configs_that_made_the_shipped_lam(stem, tokens_stay, pusht, tmp_path):
    (words,) = config_comment(ROOT / "configs" / f"{stem}.yaml")
    places = {"DIR": str(pusht.root), "OUT": str(tmp_path / "lam"), "configs/": f"{ROOT}/configs/"}
    for name, place in places.items():
        words = [word.replace(f"={name}", f"={place}") for word in words]
    fit_lam.main([*words[1:], "--steps=2", "--batch_size=4", "--holdout_episodes=1"])
    same = load_lam(tmp_path / "lam").fingerprint == load_lam("pusht-compact").fingerprint
    assert same == tokens_stay


@pytest.mark.slow
@pytest.mark.parametrize(
    "stem", sorted({path.stem.partition("_")[2] for path in CONFIGS} - {"", "pusht_compact", *CLUSTERS})
)
def test_configs_run_offline(stem, execute, tmp_path):
    """As they are, but for the LAM of the Hub and the flags of `SHORT`."""
    pytest.importorskip("gym_pusht")
    story = [
        words
        for name in ("precompute", "train")
        for path in CONFIGS
        if path.stem == f"{name}_{stem}"
        for words in config_comment(path)
    ]
    run, _ = execute
    for words in story:
        configs = [ROOT / word.partition("=")[2] for word in words if word.startswith("--config_path=")]
        text = "".join(path.read_text("utf-8") for path in configs)
        flag = "--policy.lam_model_path" if "lerobot-train" in words else "--lam.path"
        named = [f"{flag}={offline}" for ours, offline in OFFLINE.items() if ours in text]
        run(words, *named, *(["--num_episodes=2"] if words[0] == "lerobot-lam-demo" else []))
    assert list(tmp_path.glob("outputs/*/checkpoints/last/pretrained_model/model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", CLUSTERS)
def test_configs_of_a_cluster_would_be_submitted(engine, execute, capsys):
    run, _ = execute
    (words,) = config_comment(ROOT / "configs" / f"precompute_{engine}.yaml")
    run(words, "--lam.path=pusht-compact", "--cluster.dry_run=true")
    assert "cpus" in capsys.readouterr().out
