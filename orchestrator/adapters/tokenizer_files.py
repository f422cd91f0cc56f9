"""The files of a tokenizer, which each adapter of a trial contains."""

import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

_files: WeakKeyDictionary[Any, dict[str, bytes]] = WeakKeyDictionary()
"""Tokenizer -> its files."""


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files that `save_pretrained` writes for a tokenizer: path relative to the folder -> content.

    They are cached: `save_pretrained` holds Python's global lock, which stalls training threads.
    """
    if (files := _files.get(tokenizer)) is None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        _files[tokenizer] = files
    return files
