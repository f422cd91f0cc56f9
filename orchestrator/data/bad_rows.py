"""Rows that cannot be used: each has a fault of some kind, and all faults are reported together."""

import re
from collections.abc import Sequence

from orchestrator.errors import DataError
from orchestrator.record import BadRows
from orchestrator.words import counted

_MAX_PLACES = 3


class RowError(DataError):
    """One row is not what its format needs. Other rows may be good."""

    def __init__(self, where: str, fault: str, remedy: str = "", kind: str = "") -> None:
        """
        Args:
            where: file and line of the row, or its number.
            fault: what is wrong with the row.
            remedy: what to do about it.
            kind: the fault without anything that is specific to this row; default `fault`. Faults of the same kind are
                counted together.
        """
        super().__init__(f"{where}: {fault}", remedy)
        self.args = (where, fault, remedy, kind)  # pickle rebuilds the error from these
        self.where = where
        self.kind = kind or fault


def group_faults(faults: Sequence[RowError]) -> list[BadRows]:
    """Group faults by kind, the most frequent first, each with its first places."""
    places: dict[str, list[str]] = {}
    for fault in sorted(faults, key=_natural_order):  # held-out rows were read after the training rows
        places.setdefault(fault.kind, []).append(fault.where)
    found = [BadRows(fault=kind, num_rows=len(each), first=each[:_MAX_PLACES]) for kind, each in places.items()]
    return sorted(found, key=lambda each: -each.num_rows)


def _natural_order(fault: RowError) -> list[str | int]:
    """Sort `rows.jsonl:9` before `rows.jsonl:10`: compare text and numbers separately."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", fault.where)]


def bad_rows_error(faults: Sequence[RowError], num_rows: int) -> DataError:
    """Return the error for bad rows under data.bad_rows: error.

    Args:
        faults: at least one.
        num_rows: all rows that were read, good and bad.
    """
    remedies = list(dict.fromkeys(fault.remedy for fault in faults if fault.remedy))
    if len(faults) == 1:
        only = f"It is the only bad one of {counted(num_rows, 'row')}: fix it, or set data.bad_rows: drop."
        return DataError(faults[0].message, "\n  ".join([*remedies, only]))
    lines = "\n".join(f"  {bad}" for bad in group_faults(faults))
    drop = "data.bad_rows: drop leaves such rows out and counts them."
    return DataError(
        f"{len(faults):,} of {counted(num_rows, 'row')} cannot be used:\n{lines}", "\n  ".join([*remedies, drop])
    )
