"""Follow a sweep that another process runs."""

import time
from contextlib import suppress

from rich.console import Console

from orchestrator.errors import RecordError
from orchestrator.record import PresentTrials, SweepRecord, TrialResult
from orchestrator.record.lock import driver_state
from orchestrator.report.live import SweepView

_PERIOD_S = 1.0


def watch_sweep(console: Console, record: SweepRecord) -> None:
    """Show a sweep until no driver runs it any more, or until Ctrl-C, which does not touch the sweep."""
    present = PresentTrials(record)
    seen: list[TrialResult] = []
    title = f"watching {record.paths.root}; Ctrl-C ends this view, not the sweep"
    view = SweepView(console, record.info.spec, record.info.num_trials, title, record.paths.search_ended.is_file)
    with suppress(KeyboardInterrupt), view:
        while driver_state(record.paths).is_running:
            with suppress(RecordError, OSError):  # shared storage may fail for a moment; read again next time
                trials = present.read()
                if trials != seen:
                    view.update(trials)
                    seen = trials
            time.sleep(_PERIOD_S)
