"""Tell what a sweep's search and scheduler have decided since the last look."""

from orchestrator.record.decisions import Decision, read_decisions
from orchestrator.record.sweep_record import SweepRecord

_SEEN_IN_TRIALS = ("stopped", "paused", "resumed")
"""Decisions that the states of the trials show."""


class News:
    """Returns each decision once, as a sentence. Decisions from before are no news."""

    def __init__(self, record: SweepRecord) -> None:
        """
        Args:
            record: the sweep.
        """
        self._record = record
        self._told = {_key(decision) for decision in read_decisions(record.paths)}
        self._ended = record.search_ended()

    def read(self) -> list[str]:
        """Return why trials were chosen or changed since the last call, and why the sweep has ended itself.

        Raises:
            RecordError: a record is damaged.
            OSError: the storage fails.
        """
        found = []
        for decision in read_decisions(self._record.paths):
            if decision.action not in _SEEN_IN_TRIALS and _key(decision) not in self._told:
                found.append(f"{decision.trial_id}: {decision.why}")
            self._told.add(_key(decision))
        if self._ended is None and (ended := self._record.search_ended()) is not None:
            self._ended = ended
            found.append(str(ended))
        return found


def _key(decision: Decision) -> tuple[str, str, int]:
    return decision.trial_id, decision.action, decision.step
