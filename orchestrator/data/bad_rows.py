"""Rows that cannot be used: each a fault of a kind, all of them told together."""

import re
from collections.abc import Sequence

from orchestrator.errors import DataError
from orchestrator.record import BadRows
from orchestrator.words import counted

_MOST_PLACES = 3


class RowError(DataError):
    """One row is not what its format needs. Other rows may be."""

    def __init__(self, where: str, fault: str, remedy: str = "", kind: str = "") -> None:
        """
        Args:
            where: the row's file and line, or number.
            fault: what is wrong with it.
            remedy: what to do about it.
            kind: the same for all rows with this fault, where `fault` names something of the row's own.
        """
        super().__init__(f"{where}: {fault}", remedy)
        self.args = (where, fault, remedy, kind)  # from which a pickled error is made again
        self.where = where
        self.kind = kind or fault


def grouped(faults: Sequence[RowError]) -> list[BadRows]:
    """Faults by their kind, the most frequent first, with the first places of each."""
    places: dict[str, list[str]] = {}
    for fault in sorted(faults, key=_by_number):  # rows that are held out come after those that are trained on
        places.setdefault(fault.kind, []).append(fault.where)
    found = [BadRows(fault=kind, num_rows=len(each), first=each[:_MOST_PLACES]) for kind, each in places.items()]
    return sorted(found, key=lambda each: -each.num_rows)


def _by_number(fault: RowError) -> list[str | int]:
    """Sorts `rows.jsonl:9` before `rows.jsonl:10`: text and numbers by turns."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", fault.where)]


def refusal(faults: Sequence[RowError], num_rows: int) -> DataError:
    """The error of a data section whose rows must all be good.

    Args:
        faults: at least one.
        num_rows: all rows that were read, good and bad.
    """
    remedies = list(dict.fromkeys(fault.remedy for fault in faults if fault.remedy))
    drop = "data.bad_rows: drop leaves such rows out and counts them."
    if len(faults) == 1:
        of_all = (
            f"It is the only bad one of {counted(num_rows, 'row')}: mend it, or leave it out by data.bad_rows: drop."
        )
        return DataError(faults[0].message, "\n  ".join([*remedies, of_all]))
    lines = "\n".join(f"  {bad}" for bad in grouped(faults))
    return DataError(
        f"{len(faults):,} of {counted(num_rows, 'row')} cannot be used:\n{lines}", "\n  ".join([*remedies, drop])
    )
