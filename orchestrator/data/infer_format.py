"""Make an experiment for rows without one: their columns show the format."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from orchestrator.data.files import read_local
from orchestrator.data.json_rows import array_within
from orchestrator.data.open_files import read_whole
from orchestrator.data.row import Row
from orchestrator.data.turns import in_two_columns
from orchestrator.documents import DocumentError, load_yaml
from orchestrator.errors import DataError
from orchestrator.spec import SweepSpec
from orchestrator.spec.load import override_spec
from orchestrator.spec.sections import COLUMNS_OF, file_kind
from orchestrator.spec.template import written_column

_DELIMITERS = (";", "\t", "|")
"""Characters between the fields of CSV files, other than a comma."""


def holds_rows(path: Path) -> bool:
    """Whether a path is a file or folder of rows. A JSON file with a single object may be an experiment instead."""
    if path.is_dir() or file_kind(path) != ".json":
        return path.is_dir() or file_kind(path) is not None
    try:
        document = json.loads(read_whole(path))
    except (OSError, ValueError, RecursionError, DataError):
        return True
    is_experiment = isinstance(document, dict) and ("base" in document or isinstance(document.get("data"), dict))
    return not is_experiment or array_within(document) is not None


def spec_of_rows(path: Path, overrides: Sequence[str]) -> SweepSpec:
    """Return an experiment with these rows and the embedded base; overrides are applied.

    Raises:
        DataError: there is no row, or its columns fit no format and none is given.
        SpecError: an override does not fit.
    """
    data = {"source": str(path.resolve())}
    if not any(override.startswith("data.format=") for override in overrides):
        data["format"] = _format_of(path, _delimiter(overrides))
    return override_spec({"base": {"model": "embedded"}, "data": data}, overrides, str(path))


def _delimiter(overrides: Sequence[str]) -> str | None:
    """Return the delimiter that the overrides set; None if they set none, or an invalid one (reported later)."""
    for override in overrides:
        name, _, text = override.partition("=")
        if name == "data.delimiter":
            try:
                value = load_yaml(text)
            except (yaml.YAMLError, DocumentError):
                return None
            return value if isinstance(value, str) and len(value) == 1 else None
    return None


def _format_of(path: Path, delimiter: str | None) -> str:
    row = next(read_local(path, delimiter=delimiter), None)
    if row is None:
        raise DataError(f"{path}: holds no row")
    if in_two_columns(row.values):
        return "messages"
    for name, columns in COLUMNS_OF.items():
        if row.values.keys() >= set(columns):
            return name
    raise DataError(f"{row.where}: columns {', '.join(map(repr, row.values))} fit no format", _remedy(path, row))


def _remedy(path: Path, row: Row) -> str:
    """Return overrides that read these columns, as they are typed in a shell."""
    only = next(iter(row.values)) if len(row.values) == 1 else ""
    if file_kind(path) in (".csv", ".tsv") and (others := [each for each in _DELIMITERS if each in only]):
        return f"If {others[0]!r} separates the fields: --set {_quoted('data.delimiter', others[0])}"
    texts = [name for name, value in row.values.items() if isinstance(value, str | int | float)]
    fields = [field for field in map(written_column, texts) if field is not None]
    if not fields:
        return "Format template reads named columns of text; give these rows one."
    template = _quoted("data.template", " ".join(fields))
    return f"Name them in a template, with the completion last: --set data.format=template --set {template}"


def _quoted(field: str, value: str) -> str:
    return shlex.quote(f"{field}={json.dumps(value, ensure_ascii=False)}")
