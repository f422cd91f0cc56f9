"""A planted sweep that grows: its trials are moved into place one after another, as a running sweep writes them."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planted import plant

from orchestrator.page.live import serve_report
from orchestrator.record import SweepPaths, read_sweep


class Growing:
    """A sweep of `num` trials, of which as many exist as `grow` was last asked for."""

    def __init__(self, folder: Path, num: int, **how: Any) -> None:
        """Write all trials aside, and a sweep without any."""
        self._whole = plant(folder / "whole", num, **how)
        self.paths = SweepPaths(folder / "sweep")
        self.paths.root.mkdir()
        shutil.copy(self._whole.sweep, self.paths.sweep)

    def grow(self, num: int) -> None:
        """Have so many trials."""
        for trial_id in self._whole.trial_ids()[:num]:
            if not (place := self.paths.trial(trial_id).root).exists():
                shutil.copytree(self._whole.trial(trial_id).root, place)


@contextmanager
def served(paths: SweepPaths) -> Iterator[str]:
    """Serve the live report of a sweep, and yield its address."""
    stop, found, has_begun = threading.Event(), list[str](), threading.Event()

    def ready(address: str) -> None:
        found.append(address)
        has_begun.set()

    thread = threading.Thread(target=serve_report, args=([read_sweep(paths.root)], 0, ready, stop))
    thread.start()
    try:
        assert has_begun.wait(30)
        yield found[0]
    finally:
        stop.set()
        thread.join()
