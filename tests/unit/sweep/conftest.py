"""Simulate Tune's loop without Ray: trials with given losses, under the conductor of an experiment."""

import itertools
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from simulated import begin_record

from orchestrator.record import (
    Decision,
    SweepPaths,
    TrialResult,
    TrialState,
    read_decisions,
    read_sweep,
    write_record,
)
from orchestrator.spec import parse_spec
from orchestrator.sweep.schedulers import report_order
from orchestrator.sweep.schedulers.conductor import Conductor
from orchestrator.sweep.tune_trial import COMPLETE

EVERY = 10
"""Steps between two evaluations."""
TOKENS = 7
"""Tokens of a step."""


class Wrapped:
    """The wrapper that Tune passes to a scheduler's `on_trial_result` and `choose_trial_to_run`."""

    def __init__(self, stage: "Stage") -> None:
        self._tune_controller = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tune_controller, name)


class Stage:
    """Replaces Tune's controller. A trial has one loss for each of its evaluations; NaN makes it fail."""

    def __init__(self, paths: SweepPaths, num_slots: int) -> None:
        self.paths = paths
        self.num_slots = num_slots
        self.every = read_sweep(paths.root).info.spec.training.eval_steps
        """Steps between two evaluations."""
        self.trials: list[Any] = []
        self.draw: random.Random | None = None
        """If set, it chooses which trial reports next; otherwise the trial with the fewest steps does."""
        self._idle: set[str] = set()
        """Trials whose report waits: Tune does not continue them until it is asked to."""
        self.in_lockstep = False
        """Whether all running trials report in one iteration, as in one engine; pauses are saved after that."""
        self._going_on: set[str] = set()
        self._forgotten: set[str] = set()
        """Trials that were stopped while they waited: in the state that Tune restores they still wait."""
        self.losses: dict[str, Sequence[float]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        """Searched values of trials; others have a learning rate of 1e-3."""
        self.reported: list[tuple[str, float, float]] = []
        """Reports to the searcher: trial, loss, budget."""
        self.is_search_over = False
        self.to_come: dict[str, Sequence[float]] = {}
        """Trials that are added when others end or wait."""
        self.stopped: Callable[[Any], None] = lambda _: None
        """Called with each trial that is stopped, as Tune calls `on_trial_complete` of its callbacks."""
        self.counted: dict[str, float] = {}
        """Stopped trial -> forecast that the searcher was given."""
        searcher = SimpleNamespace(
            on_pause=self._going_on.discard,
            on_unpause=self._going_on.add,
            on_trial_result=self._on_report,
            count_as=self.counted.__setitem__,
        )
        self.search_alg = SimpleNamespace(
            set_finished=self._end_search, is_finished=lambda: self.is_search_over, searcher=searcher
        )
        self.conductor = self.resume(None)

    def resume(self, saved_state: bytes | None) -> Conductor:
        """Start a new driver, with all trials as they are on disk."""
        self.conductor = Conductor(read_sweep(self.paths.root), self.num_slots, saved_state)
        self.conductor.set_search_properties("eval/loss", "min")
        trials, self.trials = self.trials, []
        for trial in trials:
            is_finished = trial.is_finished() and trial.trial_id not in self._forgotten
            self._add(trial.trial_id, is_finished, dict(trial.config), trial.last_result)
        return self.conductor

    def add(self, **losses: Sequence[float]) -> None:
        self.losses |= losses
        for name in losses:
            self._add(name, False, self.configs.get(name, {"training.learning_rate": 1e-3}), {})

    def _add(self, name: str, is_finished: bool, config: dict[str, Any], last: dict[str, Any]) -> None:
        trial = Trial("idle", stub=True, trial_id=name, config=config)
        trial.storage = SimpleNamespace(trial_fs_path=str(self.paths.tune / name))
        trial.set_status(Trial.TERMINATED if is_finished else Trial.PENDING)
        trial.update_last_result(last)
        self.paths.trial(name).root.mkdir(parents=True, exist_ok=True)
        self.trials.append(trial)
        self.conductor.on_trial_add(self, trial)

    def trial(self, name: str) -> Any:
        return next(trial for trial in self.trials if trial.trial_id == name)

    def run(self, turns: int = 1000) -> None:
        """Run iterations of Tune's loop, in each of which one trial reports, until all trials have ended."""
        for _ in range(turns):
            self._add_those_to_come()
            chosen = self.ask()
            if all(trial.is_finished() for trial in self.trials):
                return
            for trial in self.trials:
                if trial is chosen or trial.status == Trial.PENDING:
                    trial.set_status(Trial.RUNNING)
                    self._going_on.discard(trial.trial_id)
            running = [t for t in self.trials if t.status == Trial.RUNNING and t.trial_id not in self._idle]
            if not running:
                continue
            if self.draw is not None:
                self.draw.shuffle(running)
            if chosen is None or len(running) >= self.num_slots:
                if self.draw is None:
                    running.sort(key=lambda trial: trial.last_result.get("step", 0))
                for trial in running if self.in_lockstep else running[:1]:
                    if not trial.is_finished():  # the report of an earlier trial may have ended it
                        self.report(trial)
                for trial in running:
                    self.end_save(trial)
        if turns == 1000:
            raise AssertionError("the sweep does not end")

    def ask(self) -> Any:
        """Ask for a trial to run, as each iteration of Tune's loop does."""
        return self.conductor.choose_trial_to_run(Wrapped(self))

    def _add_those_to_come(self) -> None:
        busy = [t for t in self.trials if t.status in ("RUNNING", "PENDING") or t.trial_id in self._going_on]
        if self.to_come and len([t for t in busy if not t.is_finished()]) < self.num_slots:
            name = next(iter(self.to_come))
            self.add(**{name: self.to_come.pop(name)})

    def report(self, trial: Any) -> None:
        """Report the next evaluation of a trial, and do with the answer what Tune does."""
        step = trial.last_result.get("step", 0) + self.every
        losses = self.losses[trial.trial_id]
        loss = losses[step // self.every - 1]
        result = {"step": step, "tokens": TOKENS * step, "eval/loss": loss, "training_iteration": step // self.every}
        result["seconds"] = float(step)
        if loss != loss:
            self.conductor.on_trial_error(self, trial)
            trial.set_status(Trial.ERROR)
            return
        self._record(trial, step, "COMPLETE" if step == self.every * len(losses) else "RUNNING")
        if step == self.every * len(losses):
            trial.update_last_result(result | {COMPLETE: True})
            self.stop_trial(trial)
            return
        self._idle.add(trial.trial_id)  # others may continue before this one is answered
        action = self.conductor.on_trial_result(Wrapped(self), trial, dict(result))
        if action != TrialScheduler.NOOP or trial.status == Trial.PAUSED:  # PBT pauses a trial that becomes a clone
            self._idle.discard(trial.trial_id)
        trial.update_last_result(result)
        if action == TrialScheduler.STOP:
            self.stop_trial(trial)
        elif action == TrialScheduler.PAUSE:
            trial.temporary_state.saving_to = "checkpoint"
            if not self.in_lockstep:
                self.end_save(trial)

    def end_save(self, trial: Any) -> None:
        """Finish the checkpoint of a trial that is being paused; until then it is RUNNING."""
        if trial.is_saving:
            trial.temporary_state.saving_to = None
            trial.set_status(Trial.PAUSED)

    def lose(self, trial: Any) -> None:
        """Lose the trainable or worker of a trial, and restart the trial as Tune's `_try_recover` does."""
        trial.temporary_state.saving_to = None
        trial.set_status(Trial.ERROR)
        self.conductor.on_trial_error(self, trial)
        trial.set_status(Trial.PENDING)
        self.trials.remove(trial)
        self.trials.append(trial)
        self.conductor.on_trial_add(self, trial)

    def _schedule_trial_train(self, trial: Any) -> None:
        self._idle.remove(trial.trial_id)

    def _set_trial_status(self, trial: Any, status: str) -> None:
        trial.set_status(status)

    def _record(self, trial: Any, step: int, state: str) -> None:
        paths = self.paths.trial(trial.trial_id)
        config = read_sweep(self.paths.root).info.spec.trial_config(trial.config)
        result = TrialResult(
            trial_id=trial.trial_id, state=TrialState(state), config=config, metric="eval/loss", mode="min", step=step,
            tokens=TOKENS * step, gpu_seconds=step,
        )  # fmt: skip
        write_record(paths.config, config)
        write_record(paths.progress, result)

    def get_trials(self) -> list[Any]:
        return self.trials

    def get_live_trials(self) -> set[Any]:
        return {trial for trial in self.trials if not trial.is_finished()}

    def stop_trial(self, trial: Any) -> None:
        """Stop a trial as Tune's controller does."""
        if trial.is_finished():
            return
        if trial.status == Trial.RUNNING:
            self.conductor.on_trial_complete(self, trial, dict(trial.last_result))
        else:
            self.conductor.on_trial_remove(self, trial)
            self._forgotten.add(trial.trial_id)
        self.stopped(trial)
        trial.temporary_state.saving_to = None
        trial.set_status(Trial.TERMINATED)
        paths = self.paths.trial(trial.trial_id)
        if paths.progress.is_file():
            shutil.copy(paths.progress, paths.result)

    def pause_trial(self, trial: Any, should_checkpoint: bool = True) -> None:
        trial.set_status(Trial.PAUSED)

    def decisions(self, *actions: str) -> list[tuple[str, int]]:
        """Return trial and step of the decisions with these actions."""
        return [(each.trial_id, each.step) for each in self.all_decisions() if each.action in actions]

    def all_decisions(self) -> list[Decision]:
        return read_decisions(self.paths)

    def _on_report(self, trial_id: str, result: dict[str, Any]) -> None:
        self.reported.append((trial_id, result["eval/loss"], result["hyperband_info"]["budget"]))

    def _end_search(self) -> None:
        self.is_search_over = True


MakeStage = Callable[..., Stage]


@pytest.fixture
def make_stage(document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStage:
    """`make_stage({"kind": "asha"}, num_slots=2)`: trials evaluate every 10 of 40 steps; `search` is the section.

    Reports are processed as they arrive, unless `is_patient`.
    """

    number = itertools.count()

    def make(
        scheduler: dict[str, Any],
        num_slots: int = 9,
        is_patient: bool = False,
        training: dict[str, Any] | None = None,
        **search: Any,
    ) -> Stage:
        if not is_patient:
            monkeypatch.setattr(report_order, "MIN_PATIENCE_S", 0.0)
            monkeypatch.setattr(report_order, "PATIENCE", 0.0)
        section = {"space": {"training.learning_rate": {"loguniform": [1e-5, 1e-1]}}, **search}
        spec = parse_spec(
            document
            | {"training": training or {"steps": 40, "eval_steps": EVERY}, "scheduler": scheduler, "search": section}
        )
        paths = SweepPaths(tmp_path / f"sweep-{next(number)}")
        begin_record(paths, spec)
        return Stage(paths, num_slots)

    return make
