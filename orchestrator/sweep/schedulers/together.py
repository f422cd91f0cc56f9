"""Rules that compare trials and judge the reports of one moment together.

Trials of a pack report at the same moment. If they were judged one after another, the first to report would be compared
with nobody and always pass.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from orchestrator.spec import SweepSpec
from orchestrator.spec.sections import TrialConfig
from orchestrator.spec.sections.scheduler import Rungs
from orchestrator.sweep.tune_trial import plain_values

_OF_THE_EXPERIMENT = ("_spec", "_num_rows", "_least_rows")
_ROWS = ("training.batch_size", "training.accumulation")


@dataclass(frozen=True)
class Heard:
    """One evaluation of a trial."""

    step: int
    """Optimizer step."""
    time: float
    """The same in the unit in which trials are compared, see `JudgedTogether`."""
    value: float
    """Value of the metric."""
    score: float
    """The same, or its negative if a higher value is better: lower is better."""


class JudgedTogether(FIFOScheduler):  # type: ignore[misc]  # mypy skips ray
    """A rule that stops trials. It keeps what it has heard of each trial, and nothing else.

    Time is optimizer steps. Where the rows of a step differ between trials, it is the steps in which the smallest batch
    has as many rows, and so as many tokens but for the lengths of rows. With `grace_tokens` it is tokens.
    """

    def __init__(self, spec: SweepSpec, num_rows: int) -> None:
        """
        Args:
            spec: the experiment.
            num_rows: training rows, or packed sequences.
        """
        super().__init__()
        self.heard: dict[str, list[Heard]] = {}
        """Trial -> its evaluations, in order."""
        self.ended: set[str] = set()
        """Trials of which no more evaluations come."""
        self.forecasts: dict[str, float] = {}
        """Stopped trial -> value of the metric with which it would have ended, where the rule has forecast it."""
        self._values: dict[str, dict[str, Any]] = {}
        """Trial -> its searched values."""
        self._spec, self._num_rows = spec, num_rows
        differ = any(path in spec.search.space or path in spec.search.tied for path in _ROWS)
        self._least_rows = min(map(_rows_of_step, spec.samples())) if differ else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OF_THE_EXPERIMENT}

    def take_over(self, saved: Any) -> None:
        """Continue from a rule of an earlier driver, under this experiment, which a resume may have changed.

        Earlier versions saved Tune's own scheduler. Its state is dropped.
        """
        if type(saved) is type(self):
            self.__dict__.update(saved.__dict__)

    def judge(self, reports: list[tuple[Any, dict[str, Any]]]) -> dict[str, str]:
        """Hear the reports of one moment, then decide about each trial.

        Returns:
            Why a trial stops, by its id; trials that go on are left out.
        """
        for trial, result in reports:
            self._hear(trial, result)
        stops = self._stops([trial.trial_id for trial, _ in reports])
        self.ended |= stops.keys()
        return stops

    def leave_out(self, trial_id: str) -> None:
        """Note that a trial is stopped by request. It has no forecast, even if the rule has just stopped it too."""
        self.ended.add(trial_id)
        self.forecasts.pop(trial_id, None)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Judge a report that comes alone."""
        return str(TrialScheduler.STOP if self.judge([(trial, result)]) else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Hear the last report of a trial: its best evaluation."""
        if trial.trial_id not in self.ended:
            self._hear(trial, result)
        self.ended.add(trial.trial_id)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Note that a trial has failed."""
        self.ended.add(trial.trial_id)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Note that a trial was stopped while it waited."""
        self.ended.add(trial.trial_id)

    @abstractmethod
    def _stops(self, names: list[str]) -> dict[str, str]:
        """Return why a trial stops, by its id, for trials that have just reported."""

    def _hear(self, trial: Any, result: dict[str, Any]) -> None:
        name, search = trial.trial_id, self._spec.search
        self._values[name] = plain_values(trial.config)
        value = float(result[search.metric])
        score = value if search.resolved_mode == "min" else -value
        self.heard.setdefault(name, []).append(Heard(result["step"], self._time(name, result), value, score))

    def _time(self, name: str, result: dict[str, Any]) -> float:
        scheduler = self._spec.scheduler
        if isinstance(scheduler, Rungs) and scheduler.counts == "tokens":
            return float(result["tokens"])
        if self._least_rows is None:
            return float(result["step"])
        return float(result["step"] * _rows_of_step(self._config(name)) / self._least_rows)

    def _config(self, name: str) -> TrialConfig:
        return self._spec.trial_config(self._values[name])

    def _report(self, name: str) -> str:
        """Return the words for a trial's last evaluation, for the sentence of a decision."""
        last = self.heard[name][-1]
        return f"{self._spec.scheduler.kind}: {self._spec.search.metric} {last.value:.6g} at step {last.step}"


def _rows_of_step(config: TrialConfig) -> int:
    return config.training.batch_size * config.training.accumulation
