"""The trial as Ray Tune sees it: a light actor that trains nothing itself, but reports what a worker trains."""

import shutil
import socket
from pathlib import Path
from typing import Any

from ray import tune

from orchestrator.errors import ClusterError, RecordError, TrialError
from orchestrator.record import (
    ExploitCheckpoint,
    MetricPoint,
    TrialResult,
    TrialState,
    read_added,
    read_exploit_checkpoint,
    read_metrics,
    read_result,
    read_sweep,
    read_trial,
    resumable,
    start_of,
    write_record,
)
from orchestrator.record.files import BUILDING, building_beside, publish
from orchestrator.record.manifest import folder_fault
from orchestrator.storage import storage_fault
from orchestrator.sweep.tune_trial import COMPLETE, plain_values
from orchestrator.sweep.workers.attempt_client import Claim, RemoteTrial
from orchestrator.sweep.workers.losses import OutOfMemory
from orchestrator.sweep.workers.worker_client import Workers

_SAVED = "checkpoint.json"
_NUM_EXPLOIT_CHECKPOINTS = 3
"""Newest checkpoints that are kept for other trials of a population."""


class TrialTrainable(tune.Trainable):  # type: ignore[misc]  # mypy skips ray
    """Makes one Tune step of each evaluation. Its actor is reused from trial to trial.

    It takes a slot at the first step, after Tune has done its preparations, such as loading another trial's checkpoint.
    """

    _trial: RemoteTrial | None
    _claim: Claim | None

    def setup(self, config: dict[str, Any], folder: str, workers: Workers) -> None:
        """Prepare the first trial.

        Args:
            config: values of the searched fields.
            folder: the sweep's folder.
            workers: the workers of the sweep.

        Raises:
            ClusterError: this node does not see the folder.
        """
        try:
            self._sweep = read_sweep(folder)
        except RecordError as error:  # the node has joined after the check of the folder
            raise ClusterError(f"node {socket.gethostname()} does not see {folder}: it is not shared") from error
        self._workers = workers
        self._prepare(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """End the previous trial and prepare the next one."""
        self._end()
        self._prepare(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Return the report of the next evaluation, or the last report of the trial."""
        if self._trial is None and self._paths.result.is_file():  # it ended before its trainable or the driver died
            return _report_result(read_result(self._paths))
        if self._known:
            return self._report(self._known.pop(0))
        progress = self._next()
        return _report_result(progress) if isinstance(progress, TrialResult) else self._report(progress)

    def save_checkpoint(self, checkpoint_dir: str) -> str:
        """Copy the last complete checkpoint for other trials: the trial itself may delete it soon.

        Writes an `ExploitCheckpoint` into Tune's folder. Tune would pickle a dictionary.

        Returns:
            The folder. It stays empty if there is no checkpoint.
        """
        so_far = resumable(self._paths, self._config)
        if so_far is None or so_far.checkpoint is None:
            return checkpoint_dir
        source, exploit_checkpoints = self._paths.root / so_far.checkpoint, self._paths.exploit_checkpoints
        for partial in exploit_checkpoints.glob(f"{BUILDING}*"):  # left by a trainable that was killed
            shutil.rmtree(partial, ignore_errors=True)
        with building_beside(exploit_checkpoints / source.name) as building:
            # A copy, not links: a trial that restarts from an earlier step writes its files again.
            shutil.copytree(source, building, dirs_exist_ok=True)
            shutil.rmtree(exploit_checkpoints / source.name, ignore_errors=True)  # from before such a restart
            publish(building, exploit_checkpoints / source.name)
        newest_last = sorted(exploit_checkpoints.glob("checkpoint-*"), key=lambda path: path.stat().st_ctime_ns)
        for older in newest_last[:-_NUM_EXPLOIT_CHECKPOINTS]:
            shutil.rmtree(older)
        saved = ExploitCheckpoint(trial_id=self._paths.trial_id, checkpoint=so_far.checkpoint, step=so_far.step)
        write_record(Path(checkpoint_dir, _SAVED), saved)
        return checkpoint_dir

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Continue from a checkpoint of `save_checkpoint`, made here or in the trainable of another trial."""
        if not (saved := Path(checkpoint_dir, _SAVED)).is_file() or self._paths.result.is_file():
            return
        checkpoint = read_exploit_checkpoint(saved)
        self._claim_trial()
        so_far = resumable(self._paths, self._config)
        origin = f"{checkpoint.trial_id}/{checkpoint.checkpoint}"
        if so_far is None or (checkpoint.trial_id != self._paths.trial_id and so_far.parent != origin):
            self._adopt(checkpoint, origin)
        # Tune knows the reports up to that step.
        self._known = [point for point in self._known_points() if point.step > checkpoint.step]
        self._last_step = checkpoint.step

    def cleanup(self) -> None:
        """Stop the trial and give its slot back."""
        self._end()

    def _prepare(self, config: dict[str, Any]) -> None:
        self._paths = self._sweep.paths.trial(self.trial_id)
        self._config = self._sweep.info.spec.trial_config(plain_values(config))
        self._claim = None
        self._trial = None
        self._warnings: list[str] = []
        self._known = self._known_points()
        self._last_step = -1
        """Step of the last evaluation that was reported."""

    def _next(self) -> MetricPoint | TrialResult:
        """Return what comes next of the trial. An attempt that runs out of GPU memory is followed by one with less.

        Evaluations that the earlier attempt has reported are made again after its checkpoint, but not reported again.
        """
        while True:
            if self._trial is None:
                claim = self._claim_trial()
                self._trial = RemoteTrial(self._so_far(), self._paths, self._sweep.info.spec, self._workers, claim)
            try:
                progress = self._trial.next()
            except OutOfMemory:
                self._trial = self._claim = None
            else:
                if isinstance(progress, TrialResult) or progress.step > self._last_step:
                    return progress

    def _report(self, point: MetricPoint) -> dict[str, Any]:
        self._last_step = point.step
        return {**point.values, "step": point.step, "tokens": point.tokens, "seconds": point.time_s, "done": False}

    def _end(self) -> None:
        if self._trial is not None:
            self._trial.stop()
            self._trial = None
        elif self._claim is not None:
            self._claim.end()

    def _claim_trial(self) -> Claim:
        if self._claim is None:
            self._claim = Claim(self._paths, self._workers)
        return self._claim

    def _so_far(self) -> TrialResult:
        """Return the trial at its newest whole checkpoint, or as a new trial."""
        return start_of(self._paths, self._new_result())

    def _new_result(self) -> TrialResult:
        search = self._sweep.info.spec.search
        added = read_added(self._paths)
        return TrialResult(
            trial_id=self._paths.trial_id,
            state=TrialState.RUNNING,
            config=self._config,
            metric=search.metric,
            mode=search.resolved_mode,
            warnings=self._warnings,
            added_by=added and added.by,
            cloned_from=added and added.cloned_from,
        )

    def _adopt(self, checkpoint: ExploitCheckpoint, origin: str) -> None:
        """Continue from another trial's checkpoint, or from this trial's own under another configuration.

        The records of this trial up to that step stay, but its best adapter is dropped: it belongs to another
        configuration.
        """
        paths, info = self._paths, self._sweep.info
        so_far = read_trial(paths, info) if paths.progress.is_file() else self._new_result()
        donor_paths = self._sweep.paths.trial(checkpoint.trial_id)
        donor = read_trial(donor_paths, info)
        source = donor_paths.exploit_checkpoints / Path(checkpoint.checkpoint).name
        copied = paths.root / ".adopted"
        shutil.rmtree(copied, ignore_errors=True)
        try:
            shutil.copytree(source, copied / source.name)
        except OSError as error:
            shutil.rmtree(copied, ignore_errors=True)
            if storage_fault(error):
                raise
            self._warnings = [*so_far.warnings, f"began anew: {origin} was gone before it could be taken over"]
            return
        if fault := folder_fault(copied / source.name):
            shutil.rmtree(copied)
            self._warnings = [*so_far.warnings, f"began anew: {origin} is damaged: {fault}"]
            return
        shutil.rmtree(paths.checkpoints, ignore_errors=True)
        publish(copied, paths.checkpoints)
        before = [point for point in read_metrics(donor_paths) if point.step <= checkpoint.step]
        tokens = before[-1].tokens if before else 0
        start = so_far.model_copy(
            update={
                "state": TrialState.RUNNING,
                "config": self._config,
                "best": None,
                "step": checkpoint.step,
                "total_steps": donor.total_steps,
                "tokens": tokens,
                "adopted_tokens": so_far.adopted_tokens + tokens - so_far.tokens,
                "tokens_per_second": donor.tokens_per_second,
                "grad_norm": None,
                "applied": {},
                "checkpoint": checkpoint.checkpoint,
                "lacks_evaluation": False,
                "parent": so_far.parent if donor_paths == paths else origin,
            }
        )
        write_record(paths.progress, start)

    def _known_points(self) -> list[MetricPoint]:
        """Return the evaluations up to the checkpoint that the trial continues from, without that of the last step.

        They are reported again: after the loss of a driver the scheduler has forgotten them, and after the loss of a
        worker the last one may not have reached it.
        """
        start = resumable(self._paths, self._config)
        if start is None:
            return []
        last = min(start.step, (start.total_steps or start.step + 1) - 1)
        return [point for point in read_metrics(self._paths) if point.step <= last and start.metric in point.values]


def _report_result(result: TrialResult) -> dict[str, Any]:
    """Return the last report of a trial: its best evaluation, by which trials are compared.

    Raises:
        TrialError: the trial has failed.
    """
    if result.state == TrialState.FAILED or result.best is None:
        raise TrialError(result.error or "failed in an earlier attempt")
    is_complete = result.state == TrialState.COMPLETE
    counted = {"step": result.step, "tokens": result.tokens, "seconds": result.seconds}
    return {**result.best.values, **counted, "done": True, COMPLETE: is_complete}
