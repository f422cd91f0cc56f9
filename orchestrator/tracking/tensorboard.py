"""TensorBoard tracker: event files with a trial's scalars and its row of the sweep's HParams table.

Files are written with TensorBoard's own `RecordWriter`, which is synchronous and needs neither torch nor TensorFlow.
Three writers were tried and not used:

- `torch.utils.tensorboard` and TensorBoard's `EventFileWriter` load torch or TensorFlow.
- tensorboardX (2.6.5) imports torch if it is installed: 2.1 s instead of 0.7 s for this module. Its writer is a thread:
  a point is not on disk after `flush`. A full disk ends the thread, and then `add_scalar` blocks forever. Its
  `hparams` marks every trial as successful.
"""

import io
import math
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.summary.writer.record_writer import RecordWriter

from orchestrator.record import MetricPoint, TrialResult, TrialState
from orchestrator.tracking.hparams import best_tag, experiment, session_start
from orchestrator.tracking.protocol import TrialIdentity

_HPARAMS_FILE = "events.out.tfevents.0.hparams"
"""Sorts before all files with a time in their names, because TensorBoard reads a run's files in the order of names."""

_STATUS = {
    TrialState.COMPLETE: STATUS_SUCCESS,
    TrialState.STOPPED: STATUS_SUCCESS,
    TrialState.FAILED: STATUS_FAILURE,
}


class TensorBoardTracker:
    """Records a trial as a run. Its hparams are written at the start, so that a stopped trial has a row too."""

    name = "TensorBoard"

    def __init__(self, identity: TrialIdentity) -> None:
        start, folder = identity.start, identity.paths.tensorboard
        folder.mkdir(parents=True, exist_ok=True)
        self._metric, self._mode = start.metric, start.mode
        self._best = (start.best.step, start.best.values) if start.best else None
        self._identity = identity
        self._write_row(start.state)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("xb"))
        self._write(Event(file_version="brain.Event:2"))
        # START hides the scalars of earlier files. Those up to the checkpoint are replayed into this file.
        self._write(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    def replay(self, points: Sequence[MetricPoint]) -> None:
        for point in points:
            self._scalars(point)
        if self._best:
            self._log_best(*self._best)
        self._writer.flush()

    def log(self, point: MetricPoint) -> None:
        self._scalars(point)
        value = point.values.get(self._metric)
        if value is not None and self._is_better(value):
            self._best = point.step, point.values
            self._log_best(*self._best)
        self._writer.flush()

    def finish(self, result: TrialResult) -> None:
        if result.best:
            self._log_best(result.best.step, result.best.values)
        self._write_row(result.state)
        if result.state in _STATUS:
            end = SessionEndInfo(status=_STATUS[result.state], end_time_secs=time.time())
            self._write(_hparams_event(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end)))
        self._writer.close()

    def _write_row(self, state: str) -> None:
        """Replace the file of the hparams: TensorBoard keeps the first record of a tag, and state and values change."""
        identity = self._identity
        records = {
            metadata.EXPERIMENT_TAG: HParamsPluginData(experiment=experiment(identity.spec)),
            metadata.SESSION_START_INFO_TAG: HParamsPluginData(
                session_start_info=session_start(identity.spec, identity.config, state)
            ),
        }
        _replace(identity.paths.tensorboard / _HPARAMS_FILE, _event_file(records))

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        best = self._best[1][self._metric]
        return value < best if self._mode == "min" else value > best

    def _log_best(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if name.startswith("eval/"):
                self._scalar(best_tag(name), value, step)

    def _scalars(self, point: MetricPoint) -> None:
        for name, value in {**point.values, "progress/step": point.step, "progress/tokens": point.tokens}.items():
            self._scalar(name, value, point.step)

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)])))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())


def _hparams_event(tag: str, data: HParamsPluginData) -> Event:
    value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data))
    return Event(summary=Summary(value=[value]))


def _event_file(data: dict[str, HParamsPluginData]) -> bytes:
    """Return the content of an event file with these hparams records (tag -> record)."""
    written = io.BytesIO()
    writer = RecordWriter(written)
    for event in (Event(file_version="brain.Event:2"), *(_hparams_event(tag, each) for tag, each in data.items())):
        event.wall_time = time.time()
        writer.write(event.SerializeToString())
    return written.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Replace a file in one step. The temporary name lacks `tfevents`, so that TensorBoard does not read it."""
    building = path.with_name(".building-hparams")
    building.write_bytes(content)
    building.replace(path)
