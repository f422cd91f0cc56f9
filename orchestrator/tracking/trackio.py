"""trackio tracker. A sweep is a group, a trial is a run with the trial's name; a resumed trial continues its run.

Files are in the sweep's folder, or in TRACKIO_DIR. The library itself handles servers (TRACKIO_SERVER_URL) and Spaces
(TRACKIO_SPACE_ID).
"""

import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import RequestError
from orchestrator.record import MetricPoint, TrialResult
from orchestrator.tracking.protocol import TrialIdentity, missing_points
from orchestrator.tracking.secrets import hide_secrets, reason

_PROJECT = "orchestrator"

_ANSWER_S = 10.0
"""Seconds to wait for the server's answer before the first trial."""


class TrackioTracker:
    """Records a trial as a run."""

    name = "trackio"

    def __init__(self, identity: TrialIdentity) -> None:
        given = os.environ.get("TRACKIO_DIR")
        folder = Path(given) if given else identity.paths.trackio
        trackio = _import(folder)
        if folder != trackio.utils.TRACKIO_DIR:
            raise RequestError(
                f"tracking.trackio: the library writes to {trackio.utils.TRACKIO_DIR} in this process, not to {folder}",
                "Set TRACKIO_DIR to one folder for all sweeps, or run each sweep in its own process.",
            )
        self._storage = trackio.SQLiteStorage
        self._run = trackio.init(
            project=_PROJECT,
            name=identity.paths.trial_id,
            group=identity.group,
            config=identity.config.dotted(),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def replay(self, points: Sequence[MetricPoint]) -> None:
        if os.environ.get("TRACKIO_SERVER_URL") or os.environ.get("TRACKIO_SPACE_ID"):
            return  # the library keeps points that it could not send and sends them with the next run
        logs = self._storage.get_logs(_PROJECT, self._run.name, run_id=self._run.id)
        for point in missing_points(points, (each["step"] for each in logs if "progress/tokens" in each)):
            self.log(point)

    def log(self, point: MetricPoint) -> None:
        self._run.log({**point.values, "progress/tokens": point.tokens}, step=point.step)

    def finish(self, result: TrialResult) -> None:
        best = {f"best/{name}": value for name, value in result.best.values.items()} if result.best else {}
        with warnings.catch_warnings(record=True) as caught:  # the library reports failures as warnings
            warnings.simplefilter("always")
            self._run.log({"state": str(result.state), **best}, step=result.step)
            self._run.finish()
        if failures := [str(each.message) for each in caught if "trackio" in str(each.message).lower()]:
            raise OSError(failures[0])


def trackio_fault() -> RequestError | None:
    """Return why the server in TRACKIO_SERVER_URL cannot be reached; None if it can, or if the variable is not set."""
    server = os.environ.get("TRACKIO_SERVER_URL")
    if not server:
        return None
    try:
        urllib.request.urlopen(server, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:
        return None  # the server answers
    except (OSError, ValueError) as error:
        return RequestError(
            f"tracking.trackio: {hide_secrets(server)} does not answer: {reason(error)}",
            "Check TRACKIO_SERVER_URL, or unset it to use files in the sweep's folder.",
        )
    return None


def _import(folder: Path) -> Any:
    """Import the library, which reads TRACKIO_DIR once, at its import. Restore the variable for child processes."""
    given = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    try:
        import trackio
    finally:
        del os.environ["TRACKIO_DIR"]
        if given is not None:
            os.environ["TRACKIO_DIR"] = given
    return trackio
