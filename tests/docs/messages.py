"""Every message of ours that a user may see, read off the source: variable parts are `…`."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lerobot_lam_diffusion"
BUILTIN = {"FileExistsError", "NotADirectoryError", "PermissionError"}
LISTING = {"raise_problems", "problems_to_error"}
"""Functions that make one error of several problems."""
REASONS = {"reason", "_refused", "_not_delivered"}
"""Functions of hub.py that word an error of the Hub."""


@cache
def _trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def messages() -> dict[str, str]:
    """Message → where it is raised."""
    errors = _error_classes(_trees().values()) | BUILTIN
    found = {}
    for path, tree in _trees().items():
        for node, text in _texts(tree, errors):
            found.setdefault(text, f"{path.relative_to(PACKAGE.parent)}:{node.lineno}")
    return found


@cache
def sections() -> dict[str, str]:
    """Error class → the section of the docs that it names."""
    classes = {
        node.name: node
        for tree in _trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }

    def section(name: str) -> str:
        own = [
            ast.literal_eval(each.value)
            for each in classes[name].body
            if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "section"
        ]
        return own[0] if own else section(ast.unparse(classes[name].bases[0]))

    return {name: section(name) for name in _error_classes(_trees().values())}


def raised() -> Iterator[tuple[str, str, str]]:
    """Each error that is raised: its message, its class, and where."""
    for path, tree in _trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = ast.unparse(node.func)
            if name == "raise_problems":
                name = ast.unparse(node.args[2]) if len(node.args) > 2 else "UserError"
            text = _template(node.args[0])
            if name in sections() and text.strip("… .:;"):
                yield text, name, f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"


def _error_classes(trees) -> set[str]:
    """UserError and what derives from it; not UnreadableError, whose phrases other messages quote."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found: set[str] = {"UserError"}
    while (
        more := {each.name for each in classes if {ast.unparse(base) for base in each.bases} & found} - found
    ):
        found |= more
    return found


def _texts(tree: ast.Module, errors: set[str]) -> Iterator[tuple[ast.expr, str]]:
    for node in ast.walk(tree):
        told: list[ast.expr] = []
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in errors | LISTING or name.endswith("problems.append"):
                told = node.args[:1]
        elif isinstance(node, ast.Assign | ast.AugAssign):
            target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
            told = _elements(node.value) if ast.unparse(target).endswith("problems") else []
        elif isinstance(node, ast.FunctionDef) and ("problems" in node.name or node.name in REASONS):
            returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
            told = [element for value in returned for element in _elements(value) or [value]]
        for each in told:
            text = _template(each)
            if text.strip("… .:;"):
                yield each, text


def _elements(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.List):
        return node.elts
    return [node.elt] if isinstance(node, ast.ListComp) else []


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    return "…"
