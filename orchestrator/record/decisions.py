"""The log of decisions: why a trial was chosen, and which one was stopped, paused or cloned, when, and why."""

from typing import Literal

from orchestrator.record.files import append_line, write_atomic
from orchestrator.record.models import Record
from orchestrator.record.paths import SweepPaths

Action = Literal["chosen", "added", "stopped", "paused", "resumed", "cloned", "dropped"]
"""What happened to a trial, see `Decision.action`."""


class Decision(Record):
    """One line of decisions.jsonl."""

    trial_id: str
    step: int
    """Optimizer step of the trial's last evaluation."""
    action: Action
    """What happened to the trial. chosen: the search made it. added: somebody has asked for it. cloned:
    it continues from the state of `donor`, with other values. dropped: the search has drawn its point, which cannot fit
    into memory (`search.skip_unfit`); the trial never began, and has no folder."""
    why: str
    donor: str | None = None
    """Trial whose state it takes over."""


def append_decision(paths: SweepPaths, decision: Decision) -> None:
    """Append one line to the log."""
    append_line(paths.decisions, decision.model_dump_json())


def read_decisions(paths: SweepPaths) -> list[Decision]:
    """Return all decisions of a sweep, in order. A line that a crash cut short is left out."""
    if not paths.decisions.is_file():
        return []
    lines = paths.decisions.read_text(encoding="utf-8").split("\n")
    return [Decision.model_validate_json(line) for line in lines[:-1]]


def keep_decisions(paths: SweepPaths, number: int) -> None:
    """Keep the first `number` decisions; later ones will be made again."""
    kept = read_decisions(paths)[:number]
    if paths.decisions.is_file():
        write_atomic(paths.decisions, "".join(each.model_dump_json() + "\n" for each in kept))
