"""Read and write dotted fields of nested mappings, such as `lora.rank`."""

from collections.abc import Mapping, Sequence
from typing import Any


def read_path(document: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path of nested mappings; raise KeyError if there is none."""
    value: Any = document
    for key in path.split("."):
        value = value[key]
    return value


def write_keys(document: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set the value at a path of keys. Missing mappings on the way are created, also in place of None."""
    *parents, leaf = keys
    for key in parents:
        if document.get(key) is None:
            document[key] = {}
        document = document[key]
    document[leaf] = value
