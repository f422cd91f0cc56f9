"""MLflow: experiment = sweep, one run a trial, which a resumed trial goes on with.

The store is SQLite in the sweep's folder (as MLflow has it; it no longer maintains plain files), or the server that
MLFLOW_TRACKING_URI names.
"""

import fcntl
import logging
import os
import time
from pathlib import Path

# Nothing is told to others; a server that is down does not hold a trial for MLflow's 7 attempts, minutes each.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException

from orchestrator.record import MetricPoint, TrialResult, TrialState
from orchestrator.tracking.protocol import TrialIdentity

logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # it tells of each table that it makes

_MOST_PARAMS = 100
"""MLflow takes no more at a time."""


class MlflowTracker:
    """One run a trial, by the trial's name."""

    name = "MLflow"

    def __init__(self, identity: TrialIdentity) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or _local_store(identity.paths.mlflow)
        self._client = MlflowClient(tracking_uri=uri)
        experiment, trial_id = _experiment(self._client, identity.group), identity.paths.trial_id
        found = self._client.search_runs([experiment], f"attributes.run_name = '{trial_id}'", max_results=1)
        run = found[0] if found else self._client.create_run(experiment, run_name=trial_id)
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        # MLflow refuses another value for a parameter it knows: those of a trial that PBT changed stay as they began.
        new = {name: value for name, value in identity.config.dotted().items() if name not in run.data.params}
        params = [Param(name, str(value)) for name, value in new.items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[first : first + _MOST_PARAMS])

    def log(self, point: MetricPoint) -> None:
        self._log({**point.values, "progress/tokens": point.tokens}, point.step)

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
