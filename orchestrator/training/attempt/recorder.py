"""Turn a trial's events into files on disk.

This module imports no ML library, because the process that records a trial need not be the one that trains it.
"""

import re
import shutil

from orchestrator.record import (
    BestPoint,
    MetricPoint,
    TrialPaths,
    TrialResult,
    TrialState,
    end_trial,
    read_result,
    write_record,
)
from orchestrator.record.files import sync
from orchestrator.record.models import time_now
from orchestrator.spec import SweepSpec
from orchestrator.tracking import open_trackers, wanted
from orchestrator.tracking.protocol import TrialIdentity
from orchestrator.training.attempt.events import (
    Answered,
    Completed,
    Evaluated,
    Event,
    Failed,
    Left,
    Logged,
    Noted,
    Saved,
    Stepped,
    Warned,
)

CHECKPOINTS_KEPT = 2
"""Checkpoints that stay on disk: the last complete one must outlive the writing of the next."""


class TrialRecorder:
    """Records one attempt at a trial: metric points, progress and trackers, and at the end the result.

    The training process writes adapters and checkpoints into the trial's folder. The recorder deletes outdated ones,
    once the progress on disk names their successors.
    """

    def __init__(self, start: TrialResult, paths: TrialPaths, spec: SweepSpec) -> None:
        """
        Args:
            start: the trial so far; step, tokens and seconds are those of the checkpoint to continue from.
            paths: the trial's files.
            spec: the experiment, which names the trackers to use.
        """
        started = start.started or time_now()
        start = start.model_copy(update={"untracked": wanted(spec.tracking), "started": started})
        self.result = start
        self._start = start
        self._paths = paths
        self._unreported: MetricPoint | None = None
        self._warnings = list(start.warnings)
        write_record(paths.config, start.config)
        write_record(paths.progress, start)
        paths.step.unlink(missing_ok=True)  # of an earlier attempt
        self._trackers = open_trackers(TrialIdentity(paths, start, spec))
        if self._trackers.warnings:
            self._write_progress()  # so that the driver sees the warnings now

    @property
    def warnings(self) -> list[str]:
        """Everything that has gone wrong so far without stopping the trial."""
        return list(dict.fromkeys([*self._warnings, *self._trackers.warnings]))

    def record(self, event: Event) -> MetricPoint | None:
        """Record an event. The last one closes the record.

        Returns:
            The point of an evaluation. If a checkpoint belongs to the evaluation, the point is returned once that is
            complete.
        """
        start = self._start
        self._update(
            # An event from outside that ends the trial has no times: it must not lower them.
            seconds=max(self.result.seconds, round(start.seconds + event.seconds, 3)),
            gpu_seconds=max(self.result.gpu_seconds, round(start.gpu_seconds + event.gpu_seconds, 3)),
            peak_memory_gib=max(self.result.peak_memory_gib or 0.0, event.peak_memory_gib),
        )
        match event:
            case Noted(fields=fields):
                self._update(**fields)
                if "total_steps" in fields:  # views show it from the first step on
                    self._write_progress()
            case Logged():
                self._record_metrics(event)
            case Stepped(step=step):
                self._paths.step.write_text(f"{step}\n")
            case Evaluated():
                measured = self._record_evaluation(event)
                if not event.saves:
                    return measured
                self._unreported = measured
            case Saved(step=step, checkpoint=checkpoint, lacks_evaluation=lacks):
                self._update(checkpoint=checkpoint, step=max(step, self.result.step), lacks_evaluation=lacks)
                self._write_progress()
                self._drop_checkpoints()
                point, self._unreported = self._unreported, None
                return point
            case Answered(values=values):
                assert self.result.best is not None
                self._log_point(self.result.step, values)
                self._update(best=self.result.best.model_copy(update={"values": self.result.best.values | values}))
            case Warned(warning=warning):
                self._warnings.append(warning)
            case Completed():
                self._finish(TrialState.COMPLETE)
            case Failed(error=error, remedy=remedy, traceback=traceback, cause=cause):
                if traceback is not None:
                    with self._paths.log.open("a", encoding="utf-8") as log:
                        log.write(traceback)
                self._update(failure=cause)
                self._finish(TrialState.FAILED, f"{error}\n  {remedy}" if remedy else error)
            case Left(step=step):
                saved = self.result.checkpoint
                if saved is None or _step_of(saved) < step:
                    self._warnings = list(self._start.warnings)  # its steps are done again, with their warnings
                self.close()
        return None

    def close(self) -> None:
        """Close the record of a trial that will continue later, or that the driver has ended by writing its result."""
        self._paths.step.unlink(missing_ok=True)
        if self._paths.result.is_file():
            ended = read_result(self._paths)
            self._trackers.finish(ended)
            warnings = list(dict.fromkeys([*ended.warnings, *self._trackers.warnings]))
            noted = ended.model_copy(update={"warnings": warnings, "untracked": self._trackers.untracked})
            if noted != ended:
                write_record(self._paths.result, noted)
        else:
            self._write_progress()
            self._trackers.finish(self.result)
            self._write_progress()

    def _record_metrics(self, event: Logged) -> None:
        self._count_tokens(event.tokens)
        if event.training_s:
            start = self._start
            before = start.tokens / start.tokens_per_second if start.tokens_per_second else 0.0
            self._update(tokens_per_second=round(self.result.tokens / (before + event.training_s), 1))
        self._update(step=event.step, train_loss=event.values["train/loss"])
        self._log_point(event.step, event.values)
        norm = event.values["train/grad_norm"]
        if norm < float("inf"):
            self._update(grad_norm=max(norm, self.result.grad_norm or 0.0))

    def _record_evaluation(self, event: Evaluated) -> MetricPoint:
        self._count_tokens(event.tokens)
        self._update(step=event.step, lacks_evaluation=False)
        point = self._log_point(event.step, event.values)
        if event.adapter is not None:
            value = event.values[self.result.metric]
            self._update(best=BestPoint(value=value, step=event.step, values=event.values, adapter=event.adapter))
        self._write_progress()
        self._drop_adapters()
        return point

    def _count_tokens(self, attempt_tokens: int) -> None:
        self._update(tokens=self._start.tokens + attempt_tokens)

    def _log_point(self, step: int, values: dict[str, float]) -> MetricPoint:
        point = MetricPoint(step=step, tokens=self.result.tokens, time_s=self.result.seconds, values=values)
        self._trackers.log(point)
        return point

    def _finish(self, state: TrialState, error: str | None = None) -> None:
        """Close the trackers, then write the result. Once that exists, nothing more of the trial comes."""
        self._paths.step.unlink(missing_ok=True)
        self._update(state=state, error=error)
        self._trackers.finish(self.result)
        self._note_trackers()
        self._sync_metrics()
        self.result = end_trial(self._paths, self.result)
        self._drop_adapters()

    def _write_progress(self) -> None:
        self._note_trackers()
        self._sync_metrics()
        write_record(self._paths.progress, self.result)

    def _sync_metrics(self) -> None:
        """Wait until the disk holds all points, before a record counts them."""
        if self._paths.metrics.is_file():
            sync(self._paths.metrics)

    def _note_trackers(self) -> None:
        self._update(
            warnings=self.warnings,
            untracked=list(self._trackers.untracked),
        )

    def _drop_adapters(self) -> None:
        """Delete all adapters but the best, which the record on disk already names."""
        best, step = self.result.best, self.result.step
        for folder in self._paths.root.glob("adapters/step-*"):
            # An adapter of a later step has been written, but its event has not arrived yet.
            if _step_of(folder.name) <= step and (best is None or folder != self._paths.root / best.adapter):
                shutil.rmtree(folder)

    def _drop_checkpoints(self) -> None:
        assert self.result.checkpoint is not None
        last = _step_of(self.result.checkpoint)
        older = [each for each in self._paths.checkpoints.glob("checkpoint-*") if _step_of(each.name) <= last]
        for folder in sorted(older, key=lambda each: _step_of(each.name))[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(folder)

    def _update(self, **values: object) -> None:
        self.result = self.result.model_copy(update=values)


def _step_of(name: str) -> int:
    found = re.search(r"-(\d+)$", name)
    assert found is not None, name
    return int(found[1])
