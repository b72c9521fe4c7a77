"""Flags as LeRobot spells them and as the user does, and errors without a traceback."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lerobot_lam_diffusion.scripts.command_line import Command, normalise, run_command
from lerobot_lam_diffusion.utils.errors import LamError, UserError, raise_problems

SPELLINGS = {
    "dotted": (["--dataset.repo_id=a/b", "--batch_size=3"], ["--dataset.repo_id=a/b", "--batch_size=3"]),
    "dotted with a space": (["--dataset.repo_id", "a/b"], ["--dataset.repo_id=a/b"]),
    "dashed": (["--dataset-repo-id", "a/b"], ["--dataset.repo_id=a/b"]),
    "dashed with =": (["--lam-model-path=x=y"], ["--lam.path=x=y"]),
    "camera": (["--camera-key", "observation.images.top"], ["--camera_key=observation.images.top"]),
    "a value with dashes": (
        ["--output-dir=a-b", "--near-goal", "x-y"],
        ["--output_dir=a-b", "--near_goal=x-y"],
    ),
    "no vq": (["--no-vq-tokens"], ["--use_vq_tokens=false"]),
    "vq": (["--vq-tokens", "--device", "cpu"], ["--use_vq_tokens=true", "--device=cpu"]),
    "a bare switch": (["--record-only", "--root=a"], ["--record_only=true", "--root=a"]),
    "a switch with a value": (["--record_only", "false"], ["--record_only=false"]),
    "yaml": (["--config-path", "x.yaml"], ["--config_path=x.yaml"]),
    "episodes": (
        ["--episodes", "0", "1", "2", "--device", "cpu"],
        ["--dataset.episodes=[0,1,2]", "--device=cpu"],
    ),
    "one episode": (["--episodes", "7"], ["--dataset.episodes=[7]"]),
    "no episode": (["--episodes", "--device=cpu"], ["--dataset.episodes=[]", "--device=cpu"]),
    "episodes with commas": (["--episodes=0,1,2"], ["--dataset.episodes=[0,1,2]"]),
    "episodes with both": (["--episodes", "0,", "1"], ["--dataset.episodes=[0,1]"]),
    "episodes with spaces": (["--episodes", "[0, 1]"], ["--dataset.episodes=[0,1]"]),
    "episodes as a list": (["--episodes=[0,1]"], ["--dataset.episodes=[0,1]"]),
    "dotted episodes": (["--dataset.episodes=[0,1]"], ["--dataset.episodes=[0,1]"]),
    "dotted episodes in words": (["--dataset.episodes", "0", "1"], ["--dataset.episodes=[0,1]"]),
    "negative episode": (["--episodes", "-1"], ["--dataset.episodes=[-1]"]),
    "nothing": ([], []),
}


@pytest.mark.parametrize(("argv", "expected"), SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(argv, expected):
    assert normalise(argv) == expected


@dataclass
class Inner:
    """For tests.

    Args:
        episodes: Which.
        repo_id: Whose.
        root: Where.
    """

    repo_id: str
    root: str | None = None
    episodes: list[int] | None = None


@dataclass
class Config:
    """For tests.

    Args:
        dataset: Of what.
        name: What it is called.
        batch_size: How many.
        learning_rate: How fast.
        shuffle: Whether.
        output_dir: Where to.
        cache: Where from.
        sources: Of what.
    """

    name: str
    batch_size: int = 1
    learning_rate: float | None = None
    shuffle: bool | None = None
    output_dir: Path | None = None
    cache: str | None = "c"
    sources: list[str] = field(default_factory=list)
    dataset: Inner = field(default_factory=lambda: Inner("a/b"))

    def __post_init__(self) -> None:
        problems = []
        if self.batch_size < 1:
            problems.append("--batch_size is too small")
        if self.name == "bad":
            problems.append("--name is bad")
        raise_problems("these flags do not work", problems)


COMMAND = Command("x", Config, "For tests.")


def test_words_before_the_flags():
    one, several = (Command("x", Config, "", words) for words in ("name", "sources"))
    assert one.arguments(["a #1", "--x=y", "z"]) == ['--name="a #1"', "--x=y", "z"]
    assert several.arguments(["a", "b"]) == ['--sources=["a", "b"]']
    assert several.arguments(["--x=y"]) == ["--x=y"]


def exit_of(argv, command=lambda config: None) -> str:
    with pytest.raises(SystemExit) as stop:
        run_command(COMMAND, command, argv)
    assert isinstance(stop.value.code, str)  # Python prints it to stderr and exits with 1
    assert stop.value.code.startswith("error: ")
    return stop.value.code


def test_the_command_gets_the_parsed_config():
    seen = []
    run_command(
        COMMAND,
        seen.append,
        ["--name=x", "--batch-size", "5", "--dataset-repo-id=a/b", "--episodes", "2", "0"],
    )
    assert seen == [Config("x", 5, dataset=Inner("a/b", episodes=[2, 0]))]


READ = {
    "a whole number": ("--batch_size=3", "batch_size", 3),
    "a number": ("--learning_rate=1e-3", "learning_rate", 1e-3),
    "false": ("--shuffle=false", "shuffle", False),
    "true as Python has it": ("--shuffle=True", "shuffle", True),
    "null": ("--cache=null", "cache", None),
    "nothing": ("--cache=", "cache", ""),
    "a text that YAML reads as a number": ("--cache=04:00:00", "cache", "04:00:00"),
    "a text that YAML reads as true": ("--cache=on", "cache", "on"),
    "a text in quotation marks": ("--cache='true'", "cache", "true"),
    "a comment that is none": ("--output_dir=runs #2", "output_dir", Path("runs #2")),
    "an alias that is none": ("--output_dir=*_lam", "output_dir", Path("*_lam")),
    "the home": ("--output_dir=~/runs", "output_dir", Path.home() / "runs"),
    "the home in a text": ("--cache=~/runs", "cache", f"{Path.home()}/runs"),
    "a list": ("--dataset.episodes=[0, 1]", "dataset", Inner("a/b", episodes=[0, 1])),
}


@pytest.mark.parametrize(("word", "name", "value"), READ.values(), ids=READ)
@pytest.mark.parametrize("in_two_words", [False, True])
def test_values_are_read_by_type(word, name, value, in_two_words):
    seen = []
    argv = ["--name=x", *(word.split("=", 1) if in_two_words else [word])]
    argv += ["--dataset.repo_id=a/b"] if name == "dataset" else []
    run_command(COMMAND, seen.append, argv)
    assert getattr(seen[0], name) == value


def test_a_yaml_file_holds_flags_and_the_command_line_wins(tmp_path):
    text = "name: y\nbatch_size: 7\noutput_dir: ~/runs\ndataset: {repo_id: a/b, episodes: [1, 2]}\n"
    (tmp_path / "x.yaml").write_text(text)
    seen = []
    run_command(COMMAND, seen.append, [f"--config_path={tmp_path / 'x.yaml'}", "--batch_size=9"])
    dataset = Inner("a/b", episodes=[1, 2])
    assert seen == [Config("y", 9, output_dir=Path.home() / "runs", dataset=dataset)]


def test_all_that_is_wrong_with_the_flags_is_told_at_once():
    told = exit_of(["--name=bad", "--batch_size=0"])
    assert "2 problems" in told
    assert "--batch_size is too small" in told
    assert "--name is bad" in told


UNREADABLE = {
    "missing": ([], "Missing required field(s) --name for Config (x --help)"),
    "missing inside": (["--name=x", "--dataset.root=y"], "field(s) --dataset.repo_id for Inner (x --help)"),
    "type": (["--name=x", "--batch_size=many"], "--batch_size: Couldn't parse 'many' into an int (x --help)"),
    "list": (["--name=x", "--episodes", "a"], "--dataset.episodes"),
    "optional": (["--name=x", "--learning_rate=fast"], "--learning_rate: "),
    "bracket": (["--name=x", "--sources=[0,1"], "--sources=[0,1 cannot be read: is a bracket or a quotation"),
    "no value": (["--name=x", "--batch_size"], "--batch_size: expected one argument"),
    "no value but a flag": (["--batch-size", "--name=x"], "--batch_size: expected one argument"),
    "unknown": (["--name=x", "--batch_siez=2"], "--batch_siez=2; did you mean --batch_size? (x --help)"),
    "unknown and dashed": (["--name=x", "--batch-siez", "2"], "--batch_siez=2; did you mean --batch_size?"),
    "unlike any": (["--name=x", "--foo=1", "--bar=2"], "unrecognized arguments: --foo=1 --bar=2. (x"),
    "a word": (["--name=x", "y"], "unrecognized arguments: y. (x --help)"),
}


@pytest.mark.parametrize(("argv", "expected"), UNREADABLE.values(), ids=UNREADABLE)
def test_flags_that_cannot_be_read(argv, expected, capsys):
    assert expected in usage_error(argv, capsys)


def usage_error(argv, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        run_command(COMMAND, lambda config: None, argv)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1
    assert "usage:" not in told
    return told


def test_yaml_that_is_not_there(tmp_path):
    told = exit_of([f"--config_path={tmp_path / 'train_dmo.yaml'}"])
    assert f"No such file or directory: '{tmp_path / 'train_dmo.yaml'}'" in told


def test_yaml_with_unknown_flags(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("name: x\nbatch_siez: 1\nbar: 2")
    told = usage_error([f"--config_path={tmp_path / 'x.yaml'}"], capsys)
    assert "The fields --batch_siez, --bar are not valid for Config (x --help)" in told


def test_broken_yaml(tmp_path):
    (tmp_path / "x.yaml").write_text("name: {x")
    assert "expected" in exit_of([f"--config_path={tmp_path / 'x.yaml'}"])


ERRORS = [
    UserError("u"),
    LamError("l"),
    FileExistsError("e"),
    FileNotFoundError("f"),
    PermissionError("p"),
    OSError("o"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_bad_input_is_told_without_a_traceback(error):
    def fail(_config):
        raise error

    assert exit_of(["--name=x"], fail) == f"error: {error}"


def test_a_bug_keeps_its_traceback():
    def fail(_config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(COMMAND, fail, ["--name=x"])


def test_an_interrupt_exits_quietly():
    def interrupted(_config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_command(COMMAND, interrupted, ["--name=x"])
    assert stop.value.code == 130
