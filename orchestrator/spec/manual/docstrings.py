"""Read the docstrings of fields: the string below each field of a section.

pydantic's `use_attribute_docstrings` does the same whenever a section is imported, which takes a quarter of the time in
which `orchestrator status` answers. Only the manual needs them.
"""

import ast
import inspect
import textwrap
from typing import Any


def field_docstrings(model: type[Any]) -> dict[str, str]:
    """Map the fields of a model, inherited ones too, to their docstrings; fields without one are left out."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if each.__module__.startswith("pydantic") or each is object:
            continue
        (defined,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(defined, ast.ClassDef)
        for field, below in zip(defined.body, defined.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found.pop(field.target.id, None)  # a field that is declared again has a docstring of its own, or none
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    found[field.target.id] = inspect.cleandoc(str(below.value.value))
    return found
