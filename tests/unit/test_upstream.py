"""Check that the private names of other libraries that the project depends on still exist.

The files of the libraries are parsed, not imported: all checks together take about a second, and they work where a GPU
library cannot be imported.
"""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import orchestrator
from orchestrator.private_names import PRIVATE, Private

PACKAGE = Path(orchestrator.__file__).parent
PUBLIC = {"_exit", "_replace", "_private", "_foreach_copy_", "_version", "_modules"}
"""Documented names (`os._exit`, namedtuples), the package `ray._private`, names of C++ classes that no Python file
defines, and `_modules`, without which no test of a model would pass."""


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def library_file(entry: Private) -> Path:
    top, _, rest = entry.file.partition("/")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        pytest.skip(f"{top} is not installed")
    return Path(spec.origin).parent / rest


@cache
def defined(body: ast.AST) -> dict[str, list[str] | None]:
    """Name -> parameters of a function, or None, for all names that a module or class defines or assigns."""
    found: dict[str, list[str] | None] = {}
    for node in ast.walk(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = [each.arg for each in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
        elif isinstance(node, ast.ClassDef):
            found.setdefault(node.name, None)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for each in ast.walk(target):
                    if isinstance(each, ast.Name):
                        found.setdefault(each.id, None)
                    elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
                        found.setdefault(each.attr, None)
    return found


def parsed(name: str) -> tuple[str | None, str, list[str] | None]:
    """`Class.method(self, a)` -> class, name and parameters."""
    match = re.fullmatch(r"(?:(\w+)\.)?(\w+)(?:\((.*)\))?", name)
    assert match is not None, name
    parameters = match[3]
    return match[1], match[2], None if parameters is None else re.findall(r"\w+", parameters)


CASES = [pytest.param(entry, name, id=name.partition("(")[0]) for entry in PRIVATE for name in entry.names]


@pytest.mark.parametrize(("entry", "name"), CASES)
def test_the_library_has_the_name(entry: Private, name: str) -> None:
    file = library_file(entry)
    assert file.is_file(), f"{entry.library} has no {entry.file} any more"
    class_name, attribute, parameters = parsed(name)
    scope: ast.AST = tree_of(file)
    if class_name is not None:
        classes = [node for node in ast.walk(scope) if isinstance(node, ast.ClassDef) and node.name == class_name]
        assert classes, f"{entry.file} has no class {class_name} any more"
        scope = classes[0]
    names = defined(scope)
    assert attribute in names, f"{entry.file} has no {name} any more; used in {entry.used_in}: {entry.why}"
    if parameters is not None:
        assert names[attribute] == parameters, f"{name} has other parameters; used in {entry.used_in}: {entry.why}"


@pytest.mark.parametrize(("entry", "name"), CASES)
def test_the_project_uses_the_name(entry: Private, name: str) -> None:
    assert parsed(name)[1] in (PACKAGE / entry.used_in).read_text(encoding="utf-8"), "remove the entry"


def test_each_private_attribute_of_another_object_is_listed() -> None:
    """An attribute `value._name` is either defined by the project, or has an entry."""
    trees = {file: tree_of(file) for file in PACKAGE.rglob("*.py")}
    own = {name for tree in trees.values() for name in defined(tree)}
    listed = {parsed(name)[1] for entry in PRIVATE for name in entry.names}
    missing = {
        f"{file.relative_to(PACKAGE)}: {node.attr}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.match(r"_[a-zA-Z]", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and not isinstance(node.value, ast.Call)  # super()
        and node.attr not in own | listed | PUBLIC
    }  # fmt: skip
    assert not missing, "add an entry to orchestrator/private_names.py"
