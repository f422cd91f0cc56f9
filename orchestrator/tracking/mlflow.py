"""MLflow: experiment = sweep, one run a trial, which a resumed trial goes on with.

The store is SQLite in the sweep's folder (as MLflow has it; it no longer maintains plain files), or the server that
MLFLOW_TRACKING_URI names.
"""

import fcntl
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

# MLflow sends no telemetry, and a server that is down does not hold a trial for its 7 attempts of minutes each.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException

from orchestrator.errors import RequestError
from orchestrator.record import MetricPoint, TrialResult, TrialState
from orchestrator.tracking.protocol import TrialIdentity
from orchestrator.tracking.secrets import hide_secrets, reason

logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # it tells of each table that it makes

_MOST_PARAMS = 100
"""MLflow takes no more at a time."""

_TOKENS = "progress/tokens"
"""Every point has it."""


class MlflowTracker:
    """One run a trial, by the trial's name."""

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
        # MLflow refuses another value for a parameter that it knows: what PBT has changed is a tag of the same name.
        changed = {name: str(value) for name, value in identity.config.varied.items()}
        tags = [RunTag(name, value) for name, value in changed.items() if known.get(name, value) != value]
        if tags:
            self._client.log_batch(self._run_id, tags=tags)
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[first : first + _MOST_PARAMS])

    def replay(self, points: Sequence[MetricPoint]) -> None:
        known = Counter(each.step for each in self._client.get_metric_history(self._run_id, _TOKENS))
        for point in points:
            if known[point.step]:
                known[point.step] -= 1
            else:
                self.log(point)

    def log(self, point: MetricPoint) -> None:
        self._log({**point.values, _TOKENS: point.tokens}, point.step)

    def finish(self, result: TrialResult) -> None:
        """Close the run; that of a trial that goes on later stays open."""
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
    """Why the server in MLFLOW_TRACKING_URI does not take runs of this process, or None; without it none is asked."""
    remedy = (
        "Check MLFLOW_TRACKING_URI (name and password: MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD); without "
        "it, the store is in the sweep's folder."
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
    except Exception as error:  # MLflow's own, a database's, or one about a package that is missing
        return RequestError(f"tracking.mlflow: {hide_secrets(uri)} cannot be used: {reason(error)}", remedy)
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = attempts
    return None


def _server() -> str | None:
    """The address in MLFLOW_TRACKING_URI, or None.

    The name and password of a server are taken out of it and go to the variables that MLflow has for them: else each
    message of MLflow about a request shows them.

    Raises:
        RequestError: it is no address.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or not uri.startswith(("http://", "https://")):
        return uri or None
    parts = urlsplit(uri)
    user_info, at, host = parts.netloc.rpartition("@")
    if not at and "@" in uri:
        raise RequestError(
            "tracking.mlflow: MLFLOW_TRACKING_URI is no address: its password holds one of / ? #",
            "Percent-encode it, or give it in MLFLOW_TRACKING_PASSWORD, with MLFLOW_TRACKING_USERNAME.",
        )
    if at:
        name, _, password = user_info.partition(":")
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(name)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
    return parts._replace(netloc=host).geturl()


def _local_store(folder: Path) -> str:
    """Address of the sweep's own store, made by the first trial; MLflow's making of it takes no second process."""
    folder.mkdir(parents=True, exist_ok=True)
    store, unfinished = folder / "mlflow.db", folder / "unfinished.db"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not store.exists():
            unfinished.unlink(missing_ok=True)
            MlflowClient(tracking_uri=f"sqlite:///{unfinished}").search_experiments()
            unfinished.rename(store)
    return f"sqlite:///{store}"


def _experiment(client: MlflowClient, name: str) -> str:
    """Id of the sweep's experiment."""
    try:
        found = client.get_experiment_by_name(name)
        return str(found.experiment_id if found else client.create_experiment(name))
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)  # another trial was sooner
