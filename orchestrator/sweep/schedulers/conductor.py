"""The scheduler that Tune asks. One of Tune's own decides.

Here its decisions are recorded and kept for a resume, trials wait for their turn, failures are reported to the
searcher, and the sweep ends when its budget is spent.
"""

import time
from collections.abc import Callable
from typing import Any, Literal

from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from orchestrator.record import BudgetSpent, Decision, SweepRecord, TrialPaths, read_result, read_trial, write_record
from orchestrator.record.decisions import append_decision, keep_decisions
from orchestrator.spec.search import MODEL_BASED
from orchestrator.spec.sections.scheduler import BohbScheduler, Brackets, NoScheduler, Population
from orchestrator.sweep.schedulers.brackets import UNIT, Bohb
from orchestrator.sweep.schedulers.budget import BudgetTracker
from orchestrator.sweep.schedulers.factory import make_scheduler, unit, why_cloned, why_stopped
from orchestrator.sweep.schedulers.population import Cloning
from orchestrator.sweep.schedulers.reports import Reports
from orchestrator.sweep.schedulers.scheduler_state import freeze, thaw
from orchestrator.sweep.tune_trial import COMPLETE, set_folder

_STUCK_S = 60.0
_TURNS = (Trial.RUNNING, Trial.PENDING)


class Conductor(TrialScheduler):  # type: ignore[misc]  # mypy skips ray
    """Wraps one of Tune's schedulers: keeps its state for a resume, records its decisions, and watches the budget.

    Under schedulers with brackets or a population all trials must be there before the first has reported, or Tune's
    would compare those few that have a slot. They are added as PAUSED, and started as slots get free. Under ASHA and
    the median rule, which compare a report with those before it, reports wait for their turn in `Reports`.
    """

    _supports_buffered_results = False

    def __init__(
        self,
        record: SweepRecord,
        at_once: int,
        remembered: bytes | None = None,
        look_at_failure: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """
        Args:
            record: of the sweep.
            at_once: trials that have a slot.
            remembered: what `state` gave when the driver before this one came to its end.
            look_at_failure: called with a trial whose attempt has failed; may end the sweep by raising.
        """
        super().__init__()
        self._record = record
        self._spec = record.info.spec
        self._at_once = at_once
        self._look_at_failure = look_at_failure
        scheduler = self._spec.scheduler
        self._takes_turns = isinstance(scheduler, Brackets | Population)
        self._holds = self._takes_turns and not isinstance(scheduler, BohbScheduler)
        self._inner = make_scheduler(self._spec)
        self._spending = BudgetTracker(self._spec.search.budget)
        has_order = not self._takes_turns and not isinstance(scheduler, NoScheduler)
        self._reports = Reports(at_once, self._spec.search.total_trials) if has_order else None
        record.paths.first_step.unlink(missing_ok=True)
        self._steps: dict[str, int] = {}
        self._held: set[str] = set()
        self._waiting: set[str] = set()
        self._why: dict[str, str] = {}
        self._num_decisions = 0
        self._over = record.budget_spent()
        self._stuck_since: float | None = None
        self._trials: dict[str, Any] = {}
        before = None if remembered is None else thaw(remembered, {})
        self._kept: bytes | None = None if before is None else before["kept"]
        self._to_come: set[str] = set() if before is None else set(before["trials"])
        if before is not None:
            self._waiting, self._why = before["waiting"], before["why"]

    @property
    def metric(self) -> Any:
        """See Tune."""
        return self._inner.metric

    def why_stopped(self, trial_id: str) -> str | None:
        """Why a trial was stopped; None for one that was not."""
        return self._why.get(trial_id)

    def state(self) -> bytes:
        """All that is to be known after a resume."""
        known = {"trials": [*self._trials, *self._to_come], "waiting": self._waiting, "why": self._why}
        # As long as not all trials are there again, what was kept of them stays as it is.
        return freeze(known | {"kept": self._kept or freeze({name: self.__dict__[name] for name in _KEPT})})

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """See Tune."""
        return bool(self._inner.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Take in a trial. Tune adds one again when it starts it anew after a fault: it keeps its place."""
        set_folder(trial, self._record.paths)
        if trial.trial_id in self._trials:
            if trial.trial_id in self._waiting:  # its relay was lost as its checkpoint was made
                controller._set_trial_status(trial, Trial.PAUSED)
            return
        self._trials[trial.trial_id] = trial
        if self._reports is not None:
            self._reports.add(trial)
        if trial.trial_id in self._to_come:
            self._to_come.discard(trial.trial_id)
            if not self._to_come:
                self._remember()
        else:
            self._inner.on_trial_add(controller, trial)
        if not trial.is_finished():
            self._put_in_its_place(trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See Tune. What was reported before, and is reported again after a fault, is not counted again."""
        if result["step"] <= self._steps.get(trial.trial_id, 0):
            return str(TrialScheduler.CONTINUE)
        self._count(trial)
        if self._reports is None:
            return self._hear(controller, trial, result)
        self._reports.hold(trial, result)
        return self._hear_in_order(controller, trial)

    def _hear_in_order(self, controller: Any, reporting: Any = None) -> str:
        """Hear all reports whose turn it is; once the budget is spent, all of them.

        Args:
            controller: Tune's wrapper, which does not go on with a trial whose report waits.
            reporting: the trial that Tune asks about.

        Returns:
            What is to become of that trial; NOOP where its report waits.
        """
        action = str(TrialScheduler.NOOP)
        while self._reports is not None and (due := self._reports.take(bool(self._is_over(controller)))) is not None:
            trial, result = due
            if result.get(COMPLETE):
                self._ends(trial)
                if self._over is None:
                    self._inner.on_trial_complete(controller, trial, self._timed(result))
                continue
            heard = self._hear(controller, trial, result)
            if heard == TrialScheduler.STOP:
                self._reports.end(trial)
            else:
                self._reports.goes_on(trial)
            if trial is reporting:
                action = heard
            elif heard == TrialScheduler.STOP:
                controller.stop_trial(trial)
            else:  # the wrapper that Tune gives to schedulers has no public name for it (ray 2.60)
                assert heard == TrialScheduler.CONTINUE, heard
                controller._tune_controller._schedule_trial_train(trial)
        return action

    def _hear(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        trial_id, step = trial.trial_id, result["step"]
        self._steps[trial_id] = step
        if over := self._is_over(controller):
            self._write(trial, "stopped", str(over))
            return str(TrialScheduler.STOP)
        action = str(self._inner.on_trial_result(controller, trial, self._timed(result)))
        if action == TrialScheduler.STOP:
            self._write(trial, "stopped", why_stopped(self._spec, result))
        elif action == TrialScheduler.PAUSE:
            self._wait(trial, f"{self._spec.scheduler.kind}: waits for the others at step {step}")
        if isinstance(self._inner, Cloning):
            for clone in self._inner.take_clones():
                cloned = self._trials[clone.trial_id]
                why = why_cloned(self._spec, result if cloned is trial else cloned.last_result, clone)
                self._write(cloned, "cloned", why, clone.donor)
                self._steps[clone.trial_id] = clone.step
                self._wait(cloned, None)
        return action

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """See Tune: the trial has ended by itself, or was stopped as it ran."""
        self._count(trial)
        if not result.get(COMPLETE):
            self._note_stop(trial)
        elif self._reports is not None:  # heard when Tune asks next, which here has given no wrapper
            self._reports.hold(trial, result)
            return
        self._ends(trial)
        if self._over is None:
            self._inner.on_trial_complete(controller, trial, self._timed(result))

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        """See Tune: the trial was stopped as it waited."""
        self._note_stop(trial)
        self._ends(trial)
        if self._over is None:
            self._inner.on_trial_remove(controller, trial)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        """Handle a failed attempt: Tune calls this before it starts the trial anew, and when no attempt is left.

        By then a trial that is started anew has the status ERROR; one that has failed for good still has its own.
        If the sweep ends here, none of this turn's state is kept: the failure is not counted after a resume.
        """
        self._look_at_failure(trial)
        if self._reports is not None:
            self._reports.forget(trial)
        if trial.status == Trial.ERROR:
            return
        self._report_failure(controller, trial)
        self._ends(trial)
        if self._over is None:
            self._inner.on_trial_error(controller, trial)

    def _report_failure(self, controller: Any, trial: Any) -> None:
        """Let the searcher learn from a trial that failed by its own values, such as a rate at which it diverged.

        A failure of the machines says nothing about the values, and Tune's own report leaves such a trial out.
        """
        paths = self._paths_of(trial)
        if self._spec.search.algorithm not in MODEL_BASED or not paths.result.is_file():
            return
        if read_result(paths).failure in (None, "infrastructure"):
            return
        searcher = controller.search_alg.searcher
        if isinstance(self._inner, Bohb):
            searcher.report_failure(trial.trial_id, self._inner.next_rung(trial))
        else:
            searcher.report_failure(trial.trial_id)

    def choose_trial_to_run(self, controller: Any) -> Any:
        """See Tune, which asks ten times a second."""
        self._hear_in_order(controller)
        if self._is_over(controller):
            for trial in [*controller.get_trials()]:
                if trial.status in (Trial.PENDING, Trial.PAUSED):
                    controller.stop_trial(trial)
            return None
        if not self._takes_turns:
            return self._inner.choose_trial_to_run(controller)
        trials = controller.get_trials()
        if sum(trial.status in _TURNS for trial in trials) >= self._at_once:
            return None
        chosen = next(
            (trial for trial in trials if trial.trial_id in self._held and trial.status == Trial.PAUSED), None
        )
        if chosen is None:
            chosen = self._inner.choose_trial_to_run(controller)
        self._see_that_it_goes_on(trials, chosen)
        if chosen is not None and chosen.status == Trial.PAUSED:
            self._go_on(chosen)
        return chosen

    def _see_that_it_goes_on(self, trials: list[Any], chosen: Any) -> None:
        """Raise TuneError where Tune would turn round for ever: all that is left waits, and nobody is chosen."""
        waiting = [trial.trial_id for trial in trials if trial.status == Trial.PAUSED]
        if chosen is not None or not waiting or any(trial.status in _TURNS for trial in trials):
            self._stuck_since = None
            return
        self._stuck_since = self._stuck_since or time.monotonic()
        if time.monotonic() - self._stuck_since > _STUCK_S:
            raise TuneError(f"scheduler {self._spec.scheduler.kind} has {', '.join(waiting)} wait, and nobody trains")

    def debug_string(self) -> str:
        """See Tune."""
        return str(self._inner.debug_string())

    def _remember(self) -> None:
        """Restore what was kept of the trials, once all of them are here again."""
        assert self._kept is not None
        self.__dict__.update(thaw(self._kept, self._trials))
        self._kept = None
        if self._reports is not None:
            self._reports.resume(self._at_once, self._spec.search.total_trials, self._trials)
        self._spending.budget = self._spec.search.budget  # a resume may have changed it
        keep_decisions(self._record.paths, self._num_decisions)

    def _put_in_its_place(self, trial: Any) -> None:
        """Have a trial that Tune's controller is about to take wait for the others, for a slot, or for nothing.

        Tune's state forgets the end of a trial that was stopped as it waited (ray 2.60, `_schedule_trial_stop`).
        """
        if trial.trial_id in self._why and self._paths_of(trial).result.is_file():
            trial.set_status(Trial.TERMINATED)
            return
        if trial.trial_id not in self._waiting:
            self._paths_of(trial).paused.unlink(missing_ok=True)
            if not self._holds:
                return
            self._held.add(trial.trial_id)
        trial.set_status(Trial.PAUSED)

    def _wait(self, trial: Any, why: str | None) -> None:
        """A trial waits, and gives its slot back."""
        self._waiting.add(trial.trial_id)
        self._paths_of(trial).paused.touch()
        if why is not None:
            self._write(trial, "paused", why)

    def _go_on(self, trial: Any) -> None:
        self._held.discard(trial.trial_id)
        if trial.trial_id in self._waiting:
            self._waiting.discard(trial.trial_id)
            self._paths_of(trial).paused.unlink(missing_ok=True)
            self._write(
                trial, "resumed", f"{self._spec.scheduler.kind}: goes on from step {self._steps[trial.trial_id]}"
            )

    def _note_stop(self, trial: Any) -> None:
        """A trial ends without a decision on its own report.

        The budget is spent, Tune's scheduler stops it as another reports, or the driver that stopped it was lost
        before it could keep that: then its result is there already.
        """
        trial_id, paths = trial.trial_id, self._paths_of(trial)
        if trial_id in self._why:
            return
        ended = read_result(paths) if paths.result.is_file() else None
        if ended is not None and ended.stopped is not None:
            self._steps[trial_id] = ended.step
            self._write(trial, "stopped", ended.stopped)
        elif trial_id in self._steps:
            self._write(trial, "stopped", str(self._over or why_stopped(self._spec, trial.last_result)))

    def _ends(self, trial: Any) -> None:
        """A trial waits for nothing any more."""
        if self._reports is not None:
            self._reports.end(trial)
        self._held.discard(trial.trial_id)
        self._waiting.discard(trial.trial_id)
        self._paths_of(trial).paused.unlink(missing_ok=True)

    def _timed(self, result: dict[str, Any]) -> dict[str, Any]:
        """The report itself, for Tune's schedulers leave word in it for the searcher, with its time in units."""
        if (size := unit(self._spec)) is not None:
            result[UNIT] = result[self._spec.scheduler.counts] / size  # type: ignore[union-attr]
        return result

    def _paths_of(self, trial: Any) -> TrialPaths:
        return self._record.paths.trial(trial.trial_id)

    def _count(self, trial: Any) -> None:
        if self._spending.needs_records:
            self._spending.count(read_trial(self._paths_of(trial), self._record.info))

    def _is_over(self, controller: Any) -> BudgetSpent | None:
        """Return the limit of the budget that is reached, if one is, and end the search then."""
        if self._spending.needs_clock and self._record.paths.first_step.is_file():
            self._spending.start_clock()
        if self._over is None:
            self._over = self._spending.over()
            if self._over is not None:
                write_record(self._record.paths.budget, self._over)
        if self._over is not None:
            controller.search_alg.set_finished()
        return self._over

    def _write(
        self,
        trial: Any,
        action: Literal["stopped", "paused", "resumed", "cloned"],
        why: str,
        donor: str | None = None,
    ) -> None:
        if action == "stopped":
            self._why[trial.trial_id] = why
        step = self._steps.get(trial.trial_id, 0)
        append_decision(
            self._record.paths,
            Decision(trial_id=trial.trial_id, step=step, action=action, why=why, donor=donor),
        )
        self._num_decisions += 1


_KEPT = ("_inner", "_steps", "_num_decisions", "_spending", "_reports")
