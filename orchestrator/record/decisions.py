"""What the scheduler of a sweep decided: who was stopped, paused or cloned, when, and why."""

from typing import Literal

from orchestrator.record.files import append_line, write_atomic
from orchestrator.record.models import Record
from orchestrator.record.paths import SweepPaths


class Decision(Record):
    """One line of decisions.jsonl."""

    trial_id: str
    step: int
    """Optimizer step of the trial's last evaluation."""
    action: Literal["stopped", "paused", "resumed", "cloned"]
    """What became of it; cloned: it goes on from the state of `donor`, with other values."""
    why: str
    donor: str | None = None
    """Trial whose state it takes over."""


def append_decision(paths: SweepPaths, decision: Decision) -> None:
    """Write one more line."""
    append_line(paths.decisions, decision.model_dump_json())


def read_decisions(paths: SweepPaths) -> list[Decision]:
    """All of a sweep, in order. A line cut short by a crash is left out."""
    if not paths.decisions.is_file():
        return []
    lines = paths.decisions.read_text(encoding="utf-8").split("\n")
    return [Decision.model_validate_json(line) for line in lines[:-1]]


def keep_decisions(paths: SweepPaths, number: int) -> None:
    """Drop all lines but the first: those after them are decided again."""
    kept = read_decisions(paths)[:number]
    if paths.decisions.is_file():
        write_atomic(paths.decisions, "".join(each.model_dump_json() + "\n" for each in kept))
