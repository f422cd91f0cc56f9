"""Follow a sweep that another process runs, maybe on another machine."""

import time
from contextlib import suppress

from rich.console import Console

from orchestrator.errors import RecordError
from orchestrator.record import PresentTrials, SweepRecord, TrialResult, read_sweep
from orchestrator.record.lock import driver_state
from orchestrator.record.news import News
from orchestrator.report.live import SweepView
from orchestrator.report.standing import standing

_PERIOD_S = 1.0


def watch_sweep(console: Console, record: SweepRecord) -> None:
    """Show a sweep as the command that runs it does, until no driver runs it any more.

    An exception such as `KeyboardInterrupt` ends the view, not the sweep; the last table stays.
    """
    present, news, state = PresentTrials(record), News(record), driver_state(record.paths)
    seen: list[TrialResult] = []
    view = SweepView(
        console,
        record.info.spec,
        lambda: record.info.num_trials,
        f"watching {record.paths.root}; Ctrl-C ends this view, not the sweep",
        record.paths.search_ended.is_file,
        driver=lambda: standing(record, seen, state),
        elapsed_s=max(time.time() - state.driver.began, 0.0) if state.driver and state.driver.began else 0.0,
    )
    with view:
        while state.is_running:
            with suppress(RecordError, OSError):  # shared storage may fail for a moment; read again next time
                record = read_sweep(record.paths.root)  # people may have extended it
                for sentence in news.read():
                    view.say(sentence)
                trials = present.read() + present.repeats()
                if trials != seen:
                    seen = trials
                    view.update(trials)
            time.sleep(_PERIOD_S)
            state = driver_state(record.paths)
