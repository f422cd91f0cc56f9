"""What a fault test has found. Each test appends its outcomes to the file that FAULT_TABLE names."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

VARIABLE = "FAULT_TABLE"


@dataclass(frozen=True)
class FaultOutcome:
    """How often a fault was injected, and what was lost by it."""

    fault: str
    tried: int
    survived: int
    """Times after which the sweep went on, or could be continued, to its end."""
    metrics_lost: int
    """Points that were on disk before the fault and are missing, changed or doubled at the end."""
    adapters_lost: int
    """COMPLETE trials whose adapter does not pass `verify`."""
    steps_lost: int
    """Steps that were made again."""


def append_outcome(outcome: FaultOutcome) -> None:
    """Append an outcome as one line of JSON, if the environment names a file."""
    if name := os.environ.get(VARIABLE):
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def read_outcomes(file: Path) -> list[FaultOutcome]:
    """Return the outcomes in a file, one for each fault: counts of tests with the same fault are added up."""
    sums: dict[str, FaultOutcome] = {}
    numbers = [field.name for field in fields(FaultOutcome) if field.name != "fault"]
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        one = FaultOutcome(**json.loads(line))
        before = sums.get(one.fault, FaultOutcome(one.fault, *[0] * len(numbers)))
        sums[one.fault] = FaultOutcome(one.fault, *(getattr(before, name) + getattr(one, name) for name in numbers))
    return list(sums.values())


def table(outcomes: Iterable[FaultOutcome]) -> list[str]:
    """Return the lines of a table of outcomes."""
    rows = [[field.name.replace("_", " ") for field in fields(FaultOutcome)]]
    rows += [[str(value) for value in asdict(each).values()] for each in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
