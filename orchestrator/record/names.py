"""Types of names and paths in records. What a record names lies inside the folder of the sweep."""

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator


def _require_name(text: str) -> str:
    if text in ("", ".", "..") or any(char in text for char in "/\\\0"):
        raise ValueError(f"{text!r:.80} is no name: it must not be a path")
    return text


def _require_inner(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in text or "\0" in text:
        raise ValueError(f"{text!r:.80} leads out of its folder")
    return text


Name = Annotated[str, AfterValidator(_require_name)]
"""The name of one file or folder, such as that of a sweep or a trial."""

InnerPath = Annotated[str, AfterValidator(_require_inner)]
"""A path relative to a folder, with slashes, that does not leave it."""
