"""Follow a sweep by its files: the view of a running sweep and of a finished one are the same view."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from orchestrator.errors import RecordError
from orchestrator.record import SweepRecord, TrialResult

Watch = Callable[[list[TrialResult]], None]
"""Called with all trials that have begun, best first, whenever something has changed."""

_PERIOD_S = 0.5


@contextmanager
def follow(record: SweepRecord, watch: Watch) -> Iterator[None]:
    """Call `watch` from a thread until the block ends, and once more then."""
    done = threading.Event()

    def run() -> None:
        seen: list[TrialResult] = []
        while not done.wait(_PERIOD_S):
            try:
                trials = record.trials()
            except (RecordError, OSError):  # shared storage that stumbles: the next look will tell
                continue
            if trials != seen:
                watch(trials)
                seen = trials

    thread = threading.Thread(target=run, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(RecordError, OSError):  # of whatever has ended the block, that tells
            watch(record.trials())
