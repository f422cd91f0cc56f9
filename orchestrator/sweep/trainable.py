"""The trial as Ray Tune sees it."""

import os
import socket
from pathlib import Path
from typing import Any

import ray
from ray import tune

from orchestrator.errors import ClusterError, RecordError, TrialError
from orchestrator.record import (
    MetricPoint,
    SweepPaths,
    TrialPaths,
    TrialResult,
    TrialState,
    open_sweep,
    read_metrics,
    read_result,
    resumable,
)
from orchestrator.spec import TrialConfig
from orchestrator.sweep.session import TrialSession


class QloraTrial(tune.Trainable):  # type: ignore[misc]  # ray is untyped
    """One Tune step is one evaluation. The actor is reused from trial to trial, and with it imports and base."""

    def setup(self, config: dict[str, Any], folder: str) -> None:
        """`config` holds the searched fields; `folder` is the sweep's."""
        if not ray.get_gpu_ids():  # Ray hides no GPU from an actor that asked for none; read when CUDA starts
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            self._sweep = open_sweep(folder)
        except RecordError as error:  # a node that joined after the probe
            raise ClusterError(f"node {socket.gethostname()} does not see {folder}: it is not shared") from error
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """End the trial that was here, begin the next."""
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Go on to the next evaluation, or to the end."""
        if self._known:
            return _report(self._known.pop(0))
        if self._session is None:
            return _report_result(read_result(self._paths))
        event = self._session.next()
        if isinstance(event, TrialResult):
            return _report_result(event)
        return _report(event)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: the trial's own folder holds its checkpoints, and knows which one is complete."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: see `save_checkpoint`."""

    def cleanup(self) -> None:
        """End the trial in good order."""
        self._end()

    def _begin(self, config: dict[str, Any]) -> None:
        spec, paths = self._sweep.info.spec, self._sweep.paths.trial(self.trial_id)
        self._paths = paths
        self._session: TrialSession | None = None
        self._known: list[MetricPoint] = []
        if paths.result.is_file():  # ended before its worker or the driver died; the disk is the truth
            return
        trial_config = spec.trial_config(plain_values(config))
        self._known = _known_points(paths, trial_config)
        data_folder = self._sweep.paths.data

        def run(session: Any) -> TrialResult | None:
            from orchestrator.training.trial import run_trial

            return run_trial(
                trial_config,
                spec,
                paths,
                data_folder,
                session,
                sharing=spec.resources.trials_per_gpu,
                is_last_attempt=False,
            )

        self._session = TrialSession(run)

    def _end(self) -> None:
        if self._session is not None:
            self._session.stop()
            self._session = None


def _known_points(paths: TrialPaths, config: TrialConfig) -> list[MetricPoint]:
    """Evaluations up to the checkpoint that a trial goes on from, but for the last step's, which come with the result.

    They are reported again: after the loss of a driver the scheduler has forgotten them, and after the loss of a
    worker it may not have heard the last.
    """
    start = resumable(paths, config)
    if start is None:
        return []
    last = min(start.step, (start.total_steps or start.step + 1) - 1)
    return [point for point in read_metrics(paths) if point.step <= last and start.metric in point.values]


def _report(point: MetricPoint) -> dict[str, Any]:
    return {**point.values, "step": point.step, "tokens": point.tokens, "done": False}


def paths_of(trial: Any) -> TrialPaths:
    """Where a Tune trial writes: Tune's own folder lies in the sweep's, which may have been moved."""
    return SweepPaths(Path(trial.storage.experiment_fs_path).parent).trial(trial.trial_id)


def plain_values(config: dict[str, Any]) -> dict[str, Any]:
    """Searched values as JSON types: samplers give numpy scalars."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in config.items()}


def _report_result(result: TrialResult) -> dict[str, Any]:
    """The last report of a trial: its best evaluation, by which it is chosen."""
    if result.state == TrialState.FAILED or result.best is None:
        raise TrialError(result.error or "failed in an earlier attempt")
    return {**result.best.values, "step": result.step, "tokens": result.tokens, "done": True}
