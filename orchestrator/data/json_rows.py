"""Read rows of JSON: one object per line, an array of objects, or such an array inside an object."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.data.open_files import not_text, open_bytes, read_whole
from orchestrator.data.row import Row
from orchestrator.errors import DataError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that is half of a character, unless the other half follows."""

_COLUMNS_WITH_LISTS = ("messages", "conversations", "tools", "prompt", "completion")
"""Columns whose lists of objects belong to one row. A list under any other key of an object holds rows."""

_JSON_FORMS = "A .json file is an array of objects, an object with such an array, or one object per line."


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield one object per line; blank lines are skipped."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise not_text(path) from error
            if text:
                with _json_errors(where):
                    values = _DECODER.decode(text)
                yield _object(values, where, text)


def read_json(path: Path) -> Iterator[Row]:
    """Yield rows of an array, of an object that holds one, or, as many .json files have it, of one object per line."""
    with open_bytes(path) as file:
        start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    yield from (_read_array if start.startswith(b"[") else _read_objects)(path)


def array_within(values: Any) -> str | None:
    """Return the key of an object under which rows are: its only list of objects that is no column of a row."""
    if not isinstance(values, dict):
        return None
    keys = [
        key
        for key, value in values.items()
        if key not in _COLUMNS_WITH_LISTS
        and isinstance(value, list)
        and value
        and all(isinstance(each, dict) for each in value)
    ]
    return keys[0] if len(keys) == 1 else None


def _read_array(path: Path) -> Iterator[Row]:
    """Yield the rows of an array. It may be a single line, so rows are named by line and number."""
    text = read_whole(path)
    at, line, counted, number = text.index("[") + 1, 1, 0, 0
    is_open = False
    while True:
        at = _past_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line} row {number}"
        if is_open and text.startswith("]", at):
            raise DataError(f"{path}:{line}: is not JSON: the array ends with a comma", "Remove the last comma.")
        if text.startswith("]", at):
            break
        start = at
        with _json_errors(where):
            values, at = _DECODER.raw_decode(text, at)
        yield _object(values, where, text[start:at])
        at = _past_space(text, at)
        if not text.startswith((",", "]"), at):
            raise DataError(f"{where}: is not JSON: after this row comes neither a comma nor the end of the array")
        is_open = text.startswith(",", at)
        at, number = at + is_open, number + 1
    if rest := text[at + 1 :].strip():
        raise DataError(f"{path}:{line}: is not JSON: the array is followed by {rest!r:.40}")


def _read_objects(path: Path) -> Iterator[Row]:
    """Yield one object per line if the first line is one; otherwise the whole file is one object with rows in it."""
    rows = read_jsonl(path)
    try:
        first = next(rows, None)
    except DataError as error:
        yield from _read_within(path, error)
        return
    if first is None:
        return
    second = next(rows, None) if (key := array_within(first.values)) else None
    if key and second is None:
        yield from _rows_within(path, first.values, key)
        return
    yield first
    if second is not None:
        yield second
    yield from rows


def _read_within(path: Path, error_of_line: DataError) -> Iterator[Row]:
    """Yield the rows inside one object over several lines; raise the error of its first line if it is not one."""
    error_of_line = DataError(error_of_line.message, error_of_line.remedy or _JSON_FORMS)
    try:
        values = _DECODER.decode(read_whole(path))
    except _TwiceError as error:
        raise _twice(str(path), error) from error
    except (ValueError, RecursionError) as error:
        raise error_of_line from error
    if not isinstance(values, dict):
        raise error_of_line
    key = array_within(values)
    if key is None:
        raise DataError(f"{path}: holds one object without a list of rows", _JSON_FORMS)
    yield from _rows_within(path, values, key)


def _rows_within(path: Path, values: dict[str, Any], key: str) -> Iterator[Row]:
    for number, each in enumerate(values[key]):
        yield _object(each, f"{path} {key}[{number}]")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object from its pairs.

    Raises:
        _TwiceError: two pairs have the same key; Python's own parser would keep the last.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return values


class _TwiceError(ValueError):
    """A key appears twice in one object."""


def _twice(where: str, error: _TwiceError) -> DataError:
    return DataError(f"{where}: key {str(error)!r} appears twice in one object", "Rename one, or remove it.")


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


@contextmanager
def _json_errors(where: str) -> Iterator[None]:
    """Turn errors of the JSON parser into messages with the place."""
    try:
        yield
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        if comma := _trailing_comma(error):
            raise DataError(f"{where}: is not JSON: {comma} ({place})", "Remove that comma.") from error
        raise DataError(f"{where}: is not JSON: {error.msg} ({place})") from error
    except _TwiceError as error:
        raise _twice(where, error) from error
    except (ValueError, RecursionError) as error:  # a number with too many digits; lists nested too deeply
        raise DataError(f"{where}: cannot be read: {error}") from error


def _trailing_comma(error: json.JSONDecodeError) -> str | None:
    """Return a message if a comma is where nothing may follow, or before the end of an object or a list."""
    rest = error.doc[error.pos :]
    if error.msg == "Extra data" and rest.strip() == ",":
        return "a comma follows the object; a line is one object and nothing else"
    before, after = error.doc[: error.pos].rstrip(), rest.lstrip(", \t\r\n")
    if after[:1] in ("}", "]") and (before.endswith(",") or rest.startswith(",")):
        return f"a comma comes before the closing {after[0]}"
    return None


def _past_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _object(values: Any, where: str, text: str | None = None) -> Row:
    """Return a row of parsed values; `text` is the source, if it is known."""
    if not isinstance(values, dict):
        raise DataError(
            f"{where}: must be a JSON object, got {json.dumps(values):.40}",
            "A row is an object with a value for each column; an array of rows is a .json file.",
        )
    if text is not None and not _SURROGATE.search(text):
        return Row(values, where)
    if broken := [name for name, value in values.items() if not _can_be_written(value)]:
        raise DataError(f"{where}: column {broken[0]!r} holds half a character (an unpaired \\ud800 to \\udfff)")
    return Row(values, where)


def _can_be_written(value: Any) -> bool:
    """Whether a value can be encoded as UTF-8: no tokenizer accepts half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
