"""MLflow tracker. A sweep is an experiment, a trial is a run; a resumed trial continues its run.

The store is an SQLite database in the sweep's folder (MLflow no longer maintains its file store), or the server given
by MLFLOW_TRACKING_URI.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

# No telemetry. A server that is down does not delay a trial: by default MLflow makes 7 attempts of minutes each.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException

from orchestrator.errors import RequestError
from orchestrator.record import MetricPoint, TrialResult, TrialState
from orchestrator.tracking.protocol import TrialIdentity, missing_points
from orchestrator.tracking.secrets import hide_secrets, reason

logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # it logs each table that it creates

_MAX_PARAMS = 100
"""Maximum number of parameters in one request to MLflow."""

_TOKENS = "progress/tokens"
"""A metric that every point has."""


class MlflowTracker:
    """Records a trial as a run with the trial's name."""

    name = "MLflow"

    def __init__(self, identity: TrialIdentity) -> None:
        uri = _server() or _local_store(identity.paths.mlflow)
        self._client = MlflowClient(tracking_uri=uri)
        experiment, trial_id = _experiment(self._client, identity.group), identity.paths.trial_id
        found = self._client.search_runs([experiment], f"attributes.run_name = '{trial_id}'", max_results=1)
        run = found[0] if found else self._client.create_run(experiment, run_name=trial_id)
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        known, fields = run.data.params, identity.config.dotted()
        params = [Param(name, str(value)) for name, value in fields.items() if name not in known]
        # MLflow refuses to change a parameter. Values that PBT has changed become tags with the parameter's name.
        changed = {name: str(value) for name, value in identity.config.varied.items()}
        tags = [RunTag(name, value) for name, value in changed.items() if known.get(name, value) != value]
        if tags:
            self._client.log_batch(self._run_id, tags=tags)
        for first in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params[first : first + _MAX_PARAMS])

    def replay(self, points: Sequence[MetricPoint]) -> None:
        history = self._client.get_metric_history(self._run_id, _TOKENS)
        for point in missing_points(points, (each.step for each in history)):
            self.log(point)

    def log(self, point: MetricPoint) -> None:
        self._log({**point.values, _TOKENS: point.tokens}, point.step)

    def finish(self, result: TrialResult) -> None:
        """Close the run. It stays open if the trial will continue."""
        self._client.log_batch(self._run_id, tags=[RunTag("state", result.state)])
        if result.best:
            self._log({f"best/{name}": value for name, value in result.best.values.items()}, result.best.step)
        status = {
            TrialState.COMPLETE: RunStatus.FINISHED,
            TrialState.STOPPED: RunStatus.FINISHED,
            TrialState.CANCELLED: RunStatus.KILLED,
            TrialState.FAILED: RunStatus.FAILED,
        }.get(result.state)
        if status is not None:
            self._client.set_terminated(self._run_id, RunStatus.to_string(status))

    def _log(self, values: dict[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._run_id, [Metric(name, value, now_ms, step) for name, value in values.items()])


def mlflow_fault() -> RequestError | None:
    """Return why the server in MLFLOW_TRACKING_URI cannot be used; None if it can, or if the variable is not set."""
    remedy = (
        "Check MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; or unset the first to use a "
        "store in the sweep's folder."
    )
    try:
        uri = _server()
    except RequestError as error:
        return error
    if uri is None:
        return None
    attempts = os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:  # an error of MLflow, of a database driver, or of a missing package
        return RequestError(f"tracking.mlflow: {hide_secrets(uri)} cannot be used: {reason(error)}", remedy)
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = attempts
    return None


def _server() -> str | None:
    """Return the address in MLFLOW_TRACKING_URI, or None.

    A user name and password are moved from the address to the variables that MLflow reads them from. Otherwise every
    message of MLflow about a request would show them.

    Raises:
        RequestError: the variable is not a valid address.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or not uri.startswith(("http://", "https://")):
        return uri or None
    parts = urlsplit(uri)
    user_info, at, host = parts.netloc.rpartition("@")
    if not at and "@" in uri:
        raise RequestError(
            "tracking.mlflow: MLFLOW_TRACKING_URI is not a valid address; its password contains one of / ? #",
            "Percent-encode the password, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead.",
        )
    if at:
        name, _, password = user_info.partition(":")
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(name)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
    return parts._replace(netloc=host).geturl()


def _local_store(folder: Path) -> str:
    """Return the address of the sweep's own store. The first trial creates it; two processes must not do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    store, unfinished = folder / "mlflow.db", folder / "unfinished.db"
    with FileLock(folder / ".lock", fallback_to_soft=False):  # released by the system if the process is killed
        if not store.exists():
            unfinished.unlink(missing_ok=True)
            MlflowClient(tracking_uri=f"sqlite:///{unfinished}").search_experiments()
            unfinished.rename(store)
    return f"sqlite:///{store}"


def _experiment(client: MlflowClient, name: str) -> str:
    """Return the id of the sweep's experiment, which is created if needed."""
    try:
        found = client.get_experiment_by_name(name)
        return str(found.experiment_id if found else client.create_experiment(name))
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)  # another trial has just created it
