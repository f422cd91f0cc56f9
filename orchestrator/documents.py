"""Read YAML and JSON that somebody else may have written, within bounds of size, depth and aliases.

A few hundred bytes of YAML can stand for billions of values, and deep nesting overflows the stack of a parser in C.
"""

import json
from pathlib import Path
from typing import Any, Final

import yaml

MAX_BYTES: Final = 32 * 2**20
"""Bytes of one document."""
MAX_LINES_BYTES: Final = 1024 * 2**20
"""Bytes of a file of JSON lines, which grows with each evaluation of a trial."""
MAX_YAML_BYTES: Final = 2**20
"""Bytes of a YAML document: PyYAML takes some microseconds a byte."""
MAX_DEPTH: Final = 64
"""Levels of mappings and lists in a YAML document. An experiment has 8."""
MAX_NODES: Final = 50_000
"""Keys and values of a YAML document, each alias counted as what it stands for."""

_Parser: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class DocumentError(ValueError):
    """A document is out of bounds or no document. The message begins with a verb and does not name the file."""


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a file.

    Raises:
        DocumentError: it is too large.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DocumentError(f"is too large: more than {max_bytes // 2**20} MiB")
    return content


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a file.

    Raises:
        DocumentError: it is too large, or is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"is not UTF-8 text: {error}") from error


def read_json(path: Path) -> Any:
    """Return the JSON document in a file.

    Raises:
        DocumentError: it is too large, too deep, or is not JSON.
        OSError: it cannot be read.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DocumentError("is nested too deeply") from error
    except ValueError as error:  # or a number of thousands of digits
        raise DocumentError(f"is not JSON: {error}") from error


def load_yaml(text: str, loader: Any = _Parser) -> Any:
    """Return the YAML document in a text.

    Args:
        text: the document.
        loader: a subclass of PyYAML's safe loader.

    Raises:
        DocumentError: it is too large, too deep, or has aliases that stand for too much.
        yaml.YAMLError: it is not YAML.
    """
    _check_yaml(text)
    return yaml.load(text, loader)


def _check_yaml(text: str) -> None:
    """Read the events of a document, which takes neither recursion nor memory, and count what they stand for."""
    if len(text) > MAX_YAML_BYTES:
        raise DocumentError(f"is too large: more than {MAX_YAML_BYTES // 2**20} MiB")
    sizes: dict[str, int] = {}  # anchor -> nodes that an alias of it stands for
    counts, anchors = [0], [""]  # of the open collections: nodes so far, and anchor
    for event in yaml.parse(text, _Parser):
        line = f"line {event.start_mark.line + 1}" if event.start_mark else "at an unknown line"
        if isinstance(event, yaml.CollectionStartEvent):
            counts.append(1)
            anchors.append(event.anchor or "")
            if len(counts) > MAX_DEPTH:
                raise DocumentError(f"is nested too deeply: more than {MAX_DEPTH} levels ({line})")
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise DocumentError(f"has an alias that contains itself: *{event.anchor} ({line})")
            size = sizes.get(event.anchor or "", 1)  # an unknown anchor is an error of the loader
        elif isinstance(event, yaml.ScalarEvent):
            size, anchor = 1, event.anchor
            sizes |= {anchor: size} if anchor else {}
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = counts.pop(), anchors.pop()
            sizes |= {anchor: size} if anchor else {}
        else:
            continue
        counts[-1] += size
        if counts[-1] > MAX_NODES:
            raise DocumentError(f"has more than {MAX_NODES:,} keys and values, aliases included ({line})")
