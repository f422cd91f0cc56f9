"""Files and folders that are complete or absent, never half."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUILDING = ".building-"
"""How the name of a folder begins that is on its way to its own."""


@contextmanager
def building_beside(folder: Path) -> Iterator[Path]:
    """A new folder in the same place as `folder`, to be filled and then renamed to it; on a fault it goes away.

    Raises:
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=BUILDING))
    try:
        building.chmod(0o755)
        yield building
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader, or a crash, meets the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # Ctrl-C may come when it has its own name already
        raise
