"""Which driver's copy of a sweep a store mirrors: the one whose name the store holds. Another one is out of date."""

import socket
import uuid
from pathlib import Path

from pydantic import ValidationError

from orchestrator.errors import RequestError
from orchestrator.record.files import write_atomic
from orchestrator.record.models import Record
from orchestrator.remote.store import RemoteFolder

NAME = ".holder.json"
"""The file in the store."""


class Holder(Record):
    """The copy of a sweep that is mirrored."""

    holder: str
    """A random name, new for each machine that takes the sweep over."""
    host: str
    """The machine."""


def hold(remote: RemoteFolder, root: Path) -> None:
    """Make the copy in `root` the one that is mirrored. Also checks that the store can be written and read.

    Raises:
        RemoteError: the store refuses it.
        RequestError: another driver does the same at this moment.
    """
    own = Holder(holder=uuid.uuid4().hex, host=socket.gethostname())
    remote.write(NAME, own.model_dump_json().encode())
    if holder_in(remote) != own:
        raise RequestError(
            f"{remote.uri}: another driver has taken this sweep at the same time", "Give another --name."
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(_own_file(root), own.model_dump_json())


def let_go(remote: RemoteFolder, root: Path) -> None:
    """Undo `hold`, for a sweep that has not begun."""
    remote.delete(NAME)
    _own_file(root).unlink(missing_ok=True)


def holder_in(remote: RemoteFolder) -> Holder | None:
    """Return whose copy a store mirrors; None if there is none."""
    content = remote.read(NAME)
    try:
        return None if content is None else Holder.model_validate_json(content)
    except ValidationError:
        return None


def own_holder(root: Path) -> Holder | None:
    """Return the name of the copy in a folder of this machine; None if it never was the one that is mirrored."""
    try:
        return Holder.model_validate_json(_own_file(root).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def _own_file(root: Path) -> Path:
    """Return the file beside a sweep's folder: the folder itself must be empty until the sweep begins."""
    return root.parent / f".{root.name}.holder.json"
