"""The log of decisions: why a trial was chosen, and which one was stopped, paused or cloned, when, and why."""

from typing import Literal

from orchestrator.record.checked import append_record, read_lines, record_line
from orchestrator.record.files import write_atomic
from orchestrator.record.models import Record
from orchestrator.record.names import Name
from orchestrator.record.paths import SweepPaths

Action = Literal["chosen", "added", "stopped", "paused", "resumed", "cloned", "dropped"]
"""What happened to a trial, see `Decision.action`."""


class Decision(Record):
    """One line of decisions.jsonl."""

    trial_id: Name
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
    append_record(paths.decisions, decision)


def read_decisions(paths: SweepPaths) -> list[Decision]:
    """Return all decisions of a sweep, in order. Lines that are cut or damaged are left out."""
    return read_lines(Decision, paths.decisions).records


def keep_decisions(paths: SweepPaths, number: int) -> None:
    """Keep the first `number` decisions; later ones will be made again."""
    kept = read_decisions(paths)[:number]
    if paths.decisions.is_file():
        write_atomic(paths.decisions, "".join(record_line(each) + "\n" for each in kept))
