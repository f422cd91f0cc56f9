"""A sweep that is stuck: all trials that are left wait for others."""

import time
from typing import Any

from ray.tune.error import TuneError
from ray.tune.experiment import Trial

_STUCK_S = 60.0
"""Time after which a sweep in which all trials wait is given up, in seconds."""
ACTIVE = (Trial.RUNNING, Trial.PENDING)
"""States of trials that train or are about to."""


class StuckWatch:
    """Gives a sweep up where Tune would loop forever."""

    def __init__(self, kind: str) -> None:
        """Take the kind of the scheduler, for the message."""
        self._kind = kind
        self._since_s: float | None = None

    def check(self, trials: list[Any], chosen: Any) -> None:
        """Note which trial is chosen to run next, if any.

        Raises:
            TuneError: all trials that are left have waited for a minute, and none was chosen.
        """
        waiting = [trial.trial_id for trial in trials if trial.status == Trial.PAUSED]
        if chosen is not None or not waiting or any(trial.status in ACTIVE for trial in trials):
            self._since_s = None
            return
        self._since_s = self._since_s or time.monotonic()
        if time.monotonic() - self._since_s > _STUCK_S:
            raise TuneError(f"scheduler {self._kind} lets {', '.join(waiting)} wait, and no trial trains")
