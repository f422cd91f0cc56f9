"""TensorBoard event files: scalars, and hparams in the same run, so that a sweep reads as one HParams table.

Written with TensorBoard's own record writer: torch's and `EventFileWriter` would load torch or TensorFlow, which costs
a light process seconds, and keep a thread a trial.
"""
# mypy: disable-error-code="import-untyped"

import os
import socket
import time
from collections.abc import Iterable, Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    STATUS_SUCCESS,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter

from orchestrator.record import MetricPoint, TrialResult
from orchestrator.tracking.protocol import TrialIdentity


class TensorBoardTracker:
    """One run a trial. Hparams are written at the start, so that a stopped trial has its row too."""

    name = "TensorBoard"

    def __init__(self, identity: TrialIdentity) -> None:
        folder = identity.paths.tensorboard
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a run's files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("xb"))
        self._write(Event(file_version="brain.Event:2"))
        # Hides what a lost worker had written past the checkpoint.
        self._write(Event(step=identity.resumed_step + 1, session_log=SessionLog(status=SessionLog.START)))
        varied = identity.config.varied or {
            "lora.rank": identity.config.lora.rank,
            "training.learning_rate": identity.config.training.learning_rate,
        }
        shown = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in varied.items()}
        for summary in _hparams(shown, ("eval/loss", identity.metric)):
            self._write(Event(summary=summary))
        self._writer.flush()

    def log(self, point: MetricPoint) -> None:
        for name, value in point.values.items():
            self._scalar(name, value, point.step)
        self._scalar("progress/tokens", point.tokens, point.step)
        self._writer.flush()

    def finish(self, result: TrialResult) -> None:
        if result.best:
            self._scalar(f"best/{result.metric}", result.best.value, result.best.step)
        self._writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)])))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())


def _hparams(values: Mapping[str, bool | int | float | str], metrics: Iterable[str]) -> list[Summary]:
    """The three records that the HParams table is made of.

    Args:
        values: what varies between trials.
        metrics: scalars to show beside it.
    """
    experiment, start = Experiment(), SessionStartInfo()
    for name, value in values.items():
        if isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
        kind = DATA_TYPE_STRING if isinstance(value, str) else DATA_TYPE_FLOAT64
        experiment.hparam_infos.append(HParamInfo(name=name, type=kind))
    for metric in dict.fromkeys(metrics):
        experiment.metric_infos.append(MetricInfo(name=MetricName(tag=metric)))
    records = {
        metadata.EXPERIMENT_TAG: HParamsPluginData(experiment=experiment),
        metadata.SESSION_START_INFO_TAG: HParamsPluginData(session_start_info=start),
        metadata.SESSION_END_INFO_TAG: HParamsPluginData(session_end_info=SessionEndInfo(status=STATUS_SUCCESS)),
    }
    return [
        Summary(value=[Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data))])
        for tag, data in records.items()
    ]
