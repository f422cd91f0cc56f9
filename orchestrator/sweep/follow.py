"""Follow a sweep by its files, so that a running sweep and a finished one are shown by the same code.

Runs in a thread of the driver, named `follow`.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from orchestrator.errors import RecordError
from orchestrator.record import PresentTrials, SweepRecord, TrialResult
from orchestrator.record.news import News

Watch = Callable[[list[TrialResult]], None]
"""Called with all trials that have begun, best first, whenever something has changed. Running trials have the steps
that they have made by then."""

_PERIOD_S = 0.5
_MAX_SHARE = 0.1
"""Largest share of a core that reading takes: with 1,000 trials, one reading takes a quarter of a second."""


@contextmanager
def follow(record: SweepRecord, watch: Watch, say: Callable[[str], None]) -> Iterator[None]:
    """Call `watch` from a thread until the block ends, and once more at its end.

    `say` is called with each decision of search and scheduler (`News`).
    """
    done = threading.Event()
    present, news = PresentTrials(record), News(record)

    def tell() -> None:
        for sentence in news.read():
            say(sentence)

    def run() -> None:
        seen: list[TrialResult] = []
        took = 0.0
        while not done.wait(max(_PERIOD_S, took / _MAX_SHARE)):
            began = time.thread_time()
            try:
                tell()
                trials = present.read()
            except (RecordError, OSError):  # shared storage may fail for a moment; read again next time
                continue
            if trials != seen:
                watch(trials)
                seen = trials
            took = time.thread_time() - began

    thread = threading.Thread(target=run, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(RecordError, OSError):  # an error that ended the block is reported by its caller
            tell()
            watch(record.trials())
