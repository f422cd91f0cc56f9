"""A process's place among those that hold a base in pieces. Imports no ML library: the driver hands places out, and is
told when a group is lost."""

import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path


class GroupLost(Exception):
    """No fault of a trial: the processes of a group can gather no more, because one of them is missing."""


@dataclass(frozen=True)
class Place:
    """Which piece a process holds, and where it finds the others."""

    rank: int
    num_ranks: int
    port_file: Path
    """Where rank 0 writes the port by which the others find it. Each start of rank 0 writes a new one."""


def new_group(num_ranks: int) -> list[Place]:
    """Return the places of the processes of a new group, which run on one machine."""
    port_file = Path(tempfile.gettempdir()) / f"orchestrator-{uuid.uuid4().hex}.port"
    return [Place(rank, num_ranks, port_file) for rank in range(num_ranks)]
