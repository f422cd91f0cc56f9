"""Docstrings begin with a verb or with the name of the thing, and not with a word that leaves the reader guessing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("orchestrator", "benchmarks", "scripts", "tests")
REFUSED = {"Of", "That", "Those", "By", "As", "See"}
BAD = '''
"""By module."""

x = 1
"""Of a variable."""


class C:
    """As a class."""

    field: int
    """That field."""

    def method(self) -> None:
        """See `other`."""
        self.attribute = 1
        """Those attributes."""
'''


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring: of modules, classes, functions, and behind assignments."""
    for node in ast.walk(tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if not isinstance(body, list):
                continue
            for before, statement in zip([None, *body], body, strict=False):
                if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
                    continue
                is_first = before is None and isinstance(
                    node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                )
                if isinstance(statement.value.value, str) and (
                    is_first or isinstance(before, ast.Assign | ast.AnnAssign)
                ):
                    yield statement.lineno, statement.value.value


def refused(source: str) -> list[str]:
    """Return `line: first words` of each docstring that begins with a refused word."""
    found = [(line, text.split()) for line, text in docstrings(ast.parse(source))]
    return [f"{line}: {' '.join(words[:6])}" for line, words in sorted(found) if words and words[0] in REFUSED]


def test_every_kind_of_docstring_is_read() -> None:
    assert [each.split()[1] for each in refused(BAD)] == ["By", "Of", "As", "That", "See", "Those"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_begins_with_a_refused_word(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [f"{file.relative_to(ROOT)}:{each}" for file in files for each in refused(file.read_text("utf-8"))]
    if found:
        pytest.fail("begin these docstrings with a verb or the thing's name:\n" + "\n".join(found), pytrace=False)
