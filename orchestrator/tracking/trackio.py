"""trackio: group = sweep, one run a trial by its name, which a resumed trial goes on with.

Its files lie in the sweep's folder, or in that of TRACKIO_DIR; the library itself knows servers (TRACKIO_SERVER_URL)
and Spaces (TRACKIO_SPACE_ID).
"""

import os
import warnings
from pathlib import Path
from typing import Any

from orchestrator.errors import RequestError
from orchestrator.record import MetricPoint, TrialResult
from orchestrator.tracking.protocol import TrialIdentity


class TrackioTracker:
    """One run a trial."""

    name = "trackio"

    def __init__(self, identity: TrialIdentity) -> None:
        given = os.environ.get("TRACKIO_DIR")
        folder = Path(given) if given else identity.paths.trackio
        trackio = _import(folder)
        if folder != trackio.utils.TRACKIO_DIR:
            raise RequestError(
                f"tracking.trackio: the library writes to {trackio.utils.TRACKIO_DIR} in this process, not to {folder}",
                "Set TRACKIO_DIR to one folder for all sweeps, or give each a process of its own.",
            )
        self._run = trackio.init(
            project="orchestrator",
            name=identity.paths.trial_id,
            group=identity.group,
            config=identity.config.dotted(),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, point: MetricPoint) -> None:
        self._run.log({**point.values, "progress/tokens": point.tokens}, step=point.step)

    def finish(self, result: TrialResult) -> None:
        best = {f"best/{name}": value for name, value in result.best.values.items()} if result.best else {}
        with warnings.catch_warnings(record=True) as caught:  # in which the library turns its failures
            warnings.simplefilter("always")
            self._run.log({"state": str(result.state), **best}, step=result.step)
            self._run.finish()
        if told := [str(each.message) for each in caught if "trackio" in str(each.message).lower()]:
            raise OSError(told[0])


def _import(folder: Path) -> Any:
    """The library, which reads its folder once, at its import. What is started later inherits nothing of it."""
    given = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    try:
        import trackio
    finally:
        del os.environ["TRACKIO_DIR"]
        if given is not None:
            os.environ["TRACKIO_DIR"] = given
    return trackio
