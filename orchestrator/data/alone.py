"""Rows without an experiment: what one would say of them is told by their columns."""

import json
from collections.abc import Sequence
from pathlib import Path

from orchestrator.data.files import read_local
from orchestrator.errors import DataError
from orchestrator.spec import SweepSpec
from orchestrator.spec.load import override_spec
from orchestrator.spec.sections import COLUMNS_OF, FILE_KINDS


def holds_rows(path: Path) -> bool:
    """Whether this is a file or a folder of rows, and no experiment: JSON with one object may be one."""
    if path.suffix != ".json" or path.is_dir():
        return path.is_dir() or path.suffix in FILE_KINDS
    try:
        return not isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return True


def spec_of_rows(path: Path, overrides: Sequence[str]) -> SweepSpec:
    """An experiment on these rows and the embedded base, but for what is overridden.

    Raises:
        DataError: there is no row, or its columns are those of no format and none is given.
        SpecError: an override does not fit.
    """
    data = {"source": str(path.resolve())}
    if not any(override.startswith("data.format=") for override in overrides):
        data["format"] = _format_of(path)
    return override_spec({"base": {"model": "embedded"}, "data": data}, overrides, str(path))


def _format_of(path: Path) -> str:
    row = next(read_local(path), None)
    if row is None:
        raise DataError(f"{path}: holds no row")
    for name, columns in COLUMNS_OF.items():
        if row.values.keys() >= set(columns):
            return name
    template = " ".join(f"{{{column}}}" for column in row.values)
    raise DataError(
        f"{row.where}: columns {', '.join(map(repr, row.values))} are those of no format",
        f"Name them in a template: --set data.format=template --set 'data.template=\"{template}\"'.",
    )
