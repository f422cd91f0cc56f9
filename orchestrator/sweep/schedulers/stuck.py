"""Notices a sweep in which all trials wait and none is chosen, in which Tune would loop forever."""

import time
from typing import Any

from ray.tune.error import TuneError
from ray.tune.experiment import Trial

STUCK_S = 60.0
"""Time after which such a sweep is given up, in seconds."""

ACTIVE = (Trial.RUNNING, Trial.PENDING)
"""Statuses of a trial that has a slot, or is about to get one."""


class StuckWatch:
    """Measures how long all trials that are left have been waiting."""

    def __init__(self, kind: str) -> None:
        """Start with nothing seen.

        Args:
            kind: of the scheduler.
        """
        self._kind = kind
        self._since: float | None = None

    def look(self, trials: list[Any], chosen: Any) -> None:
        """Look at all trials, after the scheduler has chosen the one to run next, or None.

        Raises:
            TuneError: all that are left have waited for `STUCK_S`.
        """
        waiting = [trial.trial_id for trial in trials if trial.status == Trial.PAUSED]
        if chosen is not None or not waiting or any(trial.status in ACTIVE for trial in trials):
            self._since = None
            return
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since > STUCK_S:
            raise TuneError(f"scheduler {self._kind} lets {', '.join(waiting)} wait, and no trial trains")
