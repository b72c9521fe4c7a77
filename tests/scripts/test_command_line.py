"""Flags as LeRobot spells them and as the user does, and errors without a traceback."""

from dataclasses import dataclass, field

import pytest

from lerobot_lam_diffusion.lam import LamError
from lerobot_lam_diffusion.problems import UserError, raise_problems
from lerobot_lam_diffusion.scripts.command_line import normalise, run_command
from lerobot_lam_diffusion.scripts.help import Command

SPELLINGS = {
    "dotted": (["--dataset.repo_id=a/b", "--batch_size=3"], ["--dataset.repo_id=a/b", "--batch_size=3"]),
    "dotted with a space": (["--dataset.repo_id", "a/b"], ["--dataset.repo_id", "a/b"]),
    "dashed": (["--dataset-repo-id", "a/b"], ["--dataset.repo_id=a/b"]),
    "dashed with =": (["--lam-model-path=x=y"], ["--lam.path=x=y"]),
    "camera": (["--camera-key", "observation.images.top"], ["--camera_key=observation.images.top"]),
    "no vq": (["--no-vq-tokens"], ["--use_vq_tokens=false"]),
    "vq": (["--vq-tokens", "--device", "cpu"], ["--use_vq_tokens=true", "--device", "cpu"]),
    "yaml": (["--config-path", "x.yaml"], ["--config_path=x.yaml"]),
    "episodes": (
        ["--episodes", "0", "1", "2", "--device", "cpu"],
        ["--dataset.episodes=[0,1,2]", "--device", "cpu"],
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


@pytest.mark.parametrize("argv", [["--camera-key"], ["--camera-key", "--device=cpu"]])
def test_a_flag_without_its_value(argv):
    with pytest.raises(SystemExit, match="error: --camera-key needs a value"):
        normalise(argv)


@dataclass
class Inner:
    episodes: list[int] | None = None


@dataclass
class Config:
    """For tests."""

    name: str
    batch_size: int = 1
    dataset: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        problems = []
        if self.batch_size < 1:
            problems.append("--batch_size is too small")
        if self.name == "bad":
            problems.append("--name is bad")
        raise_problems("these flags do not work", problems)


def exit_of(argv, command=lambda config: None) -> str:
    with pytest.raises(SystemExit) as stop:
        run_command(Config, command, argv)
    assert isinstance(stop.value.code, str)  # Python prints it to stderr and exits with 1
    assert stop.value.code.startswith("error: ")
    return stop.value.code


def test_the_command_gets_the_parsed_config():
    seen = []
    run_command(Config, seen.append, ["--name=x", "--batch-size", "5", "--episodes", "2", "0"])
    assert seen == [Config("x", 5, Inner([2, 0]))]


def test_a_yaml_file_holds_flags_and_the_command_line_wins(tmp_path):
    (tmp_path / "x.yaml").write_text("name: y\nbatch_size: 7\ndataset: {episodes: [1, 2]}\n")
    seen = []
    run_command(Config, seen.append, [f"--config_path={tmp_path / 'x.yaml'}", "--batch_size=9"])
    assert seen == [Config("y", 9, Inner([1, 2]))]


def test_all_that_is_wrong_with_the_flags_is_told_at_once():
    told = exit_of(["--name=bad", "--batch_size=0"])
    assert "2 problems" in told
    assert "--batch_size is too small" in told
    assert "--name is bad" in told


UNPARSABLE = {
    "missing": ([], "Missing required field(s) `name`"),
    "type": (["--name=x", "--batch_size=many"], "`batch_size`: Couldn't parse 'many' into an int"),
    "list": (["--name=x", "--episodes", "a"], "`dataset.episodes`"),
    "no yaml": (["--config_path=/no/such.yaml"], "/no/such.yaml"),
}


@pytest.mark.parametrize(("argv", "expected"), UNPARSABLE.values(), ids=UNPARSABLE)
def test_flags_that_cannot_be_parsed(argv, expected):
    assert expected in exit_of(argv)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("name: x\nfoo: 1\nbar: 2", "`foo`, `bar` are not valid"), ("name: {x", "expected")],
)
def test_yaml_that_does_not_fit(tmp_path, content, expected):
    (tmp_path / "x.yaml").write_text(content)
    assert expected in exit_of([f"--config_path={tmp_path / 'x.yaml'}"])


def test_unknown_flags_are_all_named(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(Config, lambda config: None, ["--name=x", "--foo=1", "--bar=2"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --foo=1 --bar=2" in capsys.readouterr().err


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

    message, section = exit_of(["--name=x"], fail).splitlines()
    assert message == f"error: {error}"
    assert section.startswith("See docs/TROUBLESHOOTING.md")


def test_flags_that_cannot_be_parsed_point_to_the_help():
    with pytest.raises(SystemExit) as stop:
        run_command(Config, lambda config: None, [], Command("lerobot-lam-x", Config, "For tests."))
    assert str(stop.value.code).endswith("\nThe flags: lerobot-lam-x --help")


def test_a_bug_keeps_its_traceback():
    def fail(_config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(Config, fail, ["--name=x"])


def test_an_interrupt_exits_quietly():
    def interrupted(_config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_command(Config, interrupted, ["--name=x"])
    assert stop.value.code == 130
