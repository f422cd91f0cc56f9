"""trackio: group = sweep, one run a trial by its name, which a resumed trial goes on with.

Its files lie in the sweep's folder, or in that of TRACKIO_DIR; the library itself knows servers (TRACKIO_SERVER_URL)
and Spaces (TRACKIO_SPACE_ID).
"""

import os
import warnings
from pathlib import Path

from orchestrator.errors import RequestError
from orchestrator.record import MetricPoint, TrialResult
from orchestrator.tracking.protocol import TrialIdentity

_GIVEN_FOLDER = os.environ.get("TRACKIO_DIR")


class TrackioTracker:
    """One run a trial."""

    name = "trackio"

    def __init__(self, identity: TrialIdentity) -> None:
        folder = Path(_GIVEN_FOLDER) if _GIVEN_FOLDER else identity.paths.trackio
        os.environ["TRACKIO_DIR"] = str(folder)  # read once, by the import
        import trackio

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
