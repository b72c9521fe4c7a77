"""Imports point one way: scripts, demo → policy → precompute → tokens, lam → utils.

Those inside functions count, those for type checkers do not. The LeRobot files of the root lie around
`policy`: it is written on top of the configuration, and the modeling file on top of it.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "lerobot_lam_diffusion"
ROOT = Path(__file__).parents[1] / PACKAGE
FLOORS = [
    {"utils", "constants", "env_workers"},
    {"tokens", "lam"},
    {"precompute"},
    {"sources"},
    {"configuration_diffusion_lam"},
    {"policy", "report"},
    {"modeling_diffusion_lam", "processor_diffusion_lam"},
    {"scripts", "demo", PACKAGE, "env_workers_preload"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SAME_FLOOR = {("scripts", "demo"), ("demo", "scripts")}  # the command runs the story, which runs the commands


def modules() -> dict[str, set[str]]:
    """Module → the modules of the package that it imports."""
    names = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        names[name.removesuffix(".__init__")] = path
    return {name: set(imported(name, path, names)) for name, path in names.items()}


def imported(name: str, path: Path, names: dict[str, Path]):
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            parts = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            targets = {f"{module}.{alias.name}" for alias in node.names}
            yield from targets & names.keys() or {module} & names.keys()


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_no_room_imports_one_above_or_beside_it():
    wrong = {
        f"{importer} → {module}"
        for importer, targets in modules().items()
        for module in targets - {PACKAGE}
        if room(importer) != room(module) and (room(importer), room(module)) not in SAME_FLOOR
        if FLOOR[room(importer)] <= FLOOR[room(module)]
    }
    assert wrong == set()


def test_no_modules_import_each_other():
    graph = {name: targets - {PACKAGE} for name, targets in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" → ".join(error.args[1])) from None


def test_a_policy_extracts_tokens_only_where_that_is_asked_for():
    """Training on a store imports no `precompute`: three modules do, imported when needed."""
    of_policy = {name: targets for name, targets in modules().items() if room(name) == "policy"}
    using = {
        name.rpartition(".")[2] for name, targets in of_policy.items() if "precompute" in map(room, targets)
    }
    assert using == {"auto", "live_cache", "guidance"}
