"""The scheduler that Tune asks. It wraps the Tune scheduler that decides (`factory`).

It records decisions, keeps its state for a resume, lets trials take turns on the slots, reports failures to the
searcher, and ends the sweep when its budget is spent.
"""

from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from orchestrator.record import BudgetSpent, Decision, SweepRecord, TrialPaths, read_result, read_trial
from orchestrator.record.decisions import Action
from orchestrator.spec.sections.scheduler import BohbScheduler
from orchestrator.sweep.schedulers.budget import BudgetTracker, record_spent
from orchestrator.sweep.schedulers.decisions import DecisionLog, why_chosen, why_cloned, why_stopped
from orchestrator.sweep.schedulers.factory import make_scheduler, with_units
from orchestrator.sweep.schedulers.failures import report_failure
from orchestrator.sweep.schedulers.population import CloneRecorder
from orchestrator.sweep.schedulers.report_queue import ReportQueue, action_of, answer_late
from orchestrator.sweep.schedulers.scheduler_state import freeze, thaw
from orchestrator.sweep.schedulers.steering import Steering
from orchestrator.sweep.schedulers.stuck import ACTIVE, StuckWatch
from orchestrator.sweep.schedulers.together import JudgedTogether
from orchestrator.sweep.schedulers.waiting import WaitingTrials, next_in_order
from orchestrator.sweep.tune_trial import COMPLETE, set_folder
from orchestrator.sweep.turns import reports_need_order, trials_take_turns
from orchestrator.upstream import set_trial_status


class Conductor(TrialScheduler):  # type: ignore[misc]  # mypy skips ray
    """Wraps a Tune scheduler.

    Under schedulers with brackets or a population all trials must be known before the first one reports; otherwise the
    Tune scheduler would compare only the few that have a slot. Such trials are added as PAUSED and start as slots
    become free. Reports of rules that judge a moment together wait in a `ReportQueue`.
    """

    _supports_buffered_results = False

    def __init__(
        self,
        record: SweepRecord,
        num_slots: int,
        saved_state: bytes | None = None,
        check_failure: Callable[[Any], None] = lambda _: None,
        allow_restarts: Callable[[Any], None] = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Args:
            record: the sweep's record.
            num_slots: number of trials that run at a time.
            saved_state: the last `state` of the previous driver; None for a new sweep.
            check_failure: called with a trial whose attempt has failed; may end the sweep by raising.
            allow_restarts: called with each trial that is added; sets how often Tune restarts it.
            say: called with messages for the user.
        """
        super().__init__()
        self._record = record
        self._spec = record.info.spec
        self._num_slots = num_slots
        self._check_failure, self._allow_restarts = check_failure, allow_restarts
        scheduler = self._spec.scheduler
        self.takes_turns = trials_take_turns(scheduler)
        self._holds_new_trials = self.takes_turns and not isinstance(scheduler, BohbScheduler)
        self._inner = make_scheduler(self._spec, record.info.num_rows)
        self._budget = BudgetTracker(self._spec.search.budget)
        needs_order = reports_need_order(scheduler)
        self._reports = ReportQueue(num_slots, self._spec.search.total_trials) if needs_order else None
        record.paths.first_step.unlink(missing_ok=True)
        self._steps: dict[str, int] = {}
        """Trial -> the last step that was processed."""
        self._waiting = WaitingTrials(self._paths_of)
        self._decisions = DecisionLog(record.paths)
        self._budget_spent = record.budget_spent()
        self._stuck_watch = StuckWatch(scheduler.kind)
        self.trials: dict[str, Any] = {}
        before = None if saved_state is None else thaw(saved_state, {})
        self._frozen: bytes | None = before and before["frozen"]
        """State of the previous driver, until Tune has restored all of its trials."""
        self._unrestored: set[str] = set(before["trials"]) if before else set()
        self.steering = Steering(record, say, before and before.get("steering"))
        self.controller: Any = None
        if before:
            self._waiting.after_report, self._decisions.stop_reasons = before["waiting"], before["stop_reasons"]

    @property
    def metric(self) -> Any:
        """The metric by which trials are compared; Tune reads it."""
        return self._inner.metric

    def why_stopped(self, trial_id: str) -> str | None:
        """Return why a trial was stopped; None for a trial that was not stopped."""
        return self._decisions.stop_reasons.get(trial_id)

    def state(self) -> bytes:
        """Return the state that a resume needs, for `saved_state`."""
        trials = [*self.trials, *self._unrestored]
        waiting, reasons = self._waiting.after_report, self._decisions.stop_reasons
        known = {"trials": trials, "waiting": waiting, "stop_reasons": reasons, "steering": self.steering.state()}
        # Until all trials are restored, the state of the previous driver stays as it is.
        present = {name: self.__dict__[name] for name in _SAVED_ATTRIBUTES}
        frozen = self._frozen or freeze(present | {"_num_decisions": self._decisions.number})
        return freeze(known | {"frozen": frozen})

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Pass metric and mode to the Tune scheduler."""
        return bool(self._inner.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Add a trial. Tune adds it again when it restarts it after a fault; it then keeps its place."""
        self.controller = controller
        set_folder(trial, self._record.paths)
        self._allow_restarts(trial)
        if trial.trial_id in self.trials:
            if trial.trial_id in self._waiting.after_report:  # its trainable was lost while its checkpoint was written
                set_trial_status(controller, trial, Trial.PAUSED)
            return
        self.trials[trial.trial_id] = trial
        if self._reports is not None:
            self._reports.add(trial)
        if trial.trial_id in self._unrestored:
            self._unrestored.discard(trial.trial_id)
            if not self._unrestored:
                self._restore()
        else:
            self._inner.on_trial_add(controller, trial)
            if trial.trial_id not in self.steering.unstarted and (why := why_chosen(controller, trial)):
                self.log(trial, "chosen", why)
        if not trial.is_finished():
            self._set_first_status(trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide about a trial that reports. A report that is repeated after a fault is ignored."""
        if result["step"] <= self._steps.get(trial.trial_id, 0):
            return str(TrialScheduler.CONTINUE)
        self._count_spending(trial)
        if self._reports is None:
            return self._process(controller, trial, result)
        self._reports.hold(trial, result)
        return self._process_due_reports(controller, trial)

    def _process_due_reports(self, controller: Any, reporting: Any = None) -> str:
        """Process all reports that are due; once the budget is spent, all reports.

        Args:
            controller: Tune's wrapper of its controller. It does not continue a trial whose report waits.
            reporting: the trial that Tune asks about.

        Returns:
            The action for that trial; NOOP where its report waits.
        """
        action = str(TrialScheduler.NOOP)
        while self._reports is not None and (due := self._reports.take(bool(self._check_budget(controller)))):
            for trial, result in due:
                if result.get(COMPLETE):
                    self._end(trial)
                    if self._budget_spent is None:
                        self._inner.on_trial_complete(controller, trial, with_units(self._spec, result))
            going_on = [(trial, result) for trial, result in due if not result.get(COMPLETE)]
            stops = self._judge(controller, going_on)
            for trial, _ in going_on:
                is_stopped = trial.trial_id in stops
                pauses = not is_stopped and self._pauses_on_request(controller, trial)
                (self._reports.end if is_stopped or pauses else self._reports.continues)(trial)
                if trial is reporting:
                    action = action_of(is_stopped, pauses)
                else:
                    answer_late(controller, trial, is_stopped, pauses)
        return action

    def _judge(self, controller: Any, reports: list[tuple[Any, dict[str, Any]]]) -> dict[str, str]:
        """Have the rule judge the reports of one moment together, and record which trials stop, and why."""
        assert isinstance(self._inner, JudgedTogether)
        for trial, result in reports:
            self._steps[trial.trial_id] = result["step"]
        spent = self._check_budget(controller)
        stops = {trial.trial_id: str(spent) for trial, _ in reports} if spent else self._inner.judge(reports)
        if not spent:
            for trial in [trial for trial, _ in reports if self.steering.leaves(trial) == "stop"]:
                stops[trial.trial_id] = self.steering.stop(trial, controller)
                self._inner.leave_out(trial.trial_id)
        for trial, _ in reports:
            if trial.trial_id in stops:
                self.log(trial, "stopped", stops[trial.trial_id])
        if self._spec.search.learns:  # stopped trials count by their present forecasts; Tune passes reports alone
            for trial_id, value in self._inner.forecasts.items():
                controller.search_alg.searcher.count_as(trial_id, value)
        return stops

    def _process(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ask the Tune scheduler about a report, and record what it decides."""
        trial_id, step = trial.trial_id, result["step"]
        self._steps[trial_id] = step
        if spent := self._check_budget(controller):
            self.log(trial, "stopped", str(spent))
            return str(TrialScheduler.STOP)
        if self.steering.leaves(trial) == "stop":
            self.log(trial, "stopped", self.steering.stop(trial, controller))
            return str(TrialScheduler.STOP)
        action = str(self._inner.on_trial_result(controller, trial, with_units(self._spec, result)))
        if action == TrialScheduler.STOP:
            self.log(trial, "stopped", why_stopped(self._spec, result))
        elif action == TrialScheduler.CONTINUE and self._pauses_on_request(controller, trial):
            action = str(TrialScheduler.PAUSE)
        elif action == TrialScheduler.PAUSE:
            self._wait(trial, f"{self._spec.scheduler.kind}: waits for the others at step {step}")
        if isinstance(self._inner, CloneRecorder):
            for clone in self._inner.take_clones():
                cloned = self.trials[clone.trial_id]
                why = why_cloned(self._spec, result if cloned is trial else cloned.last_result, clone)
                self.log(cloned, "cloned", why, clone.donor)
                self._steps[clone.trial_id] = clone.step
                self._wait(cloned, None)
        return action

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Handle a trial that has ended by itself, or was stopped while it ran."""
        self._count_spending(trial)
        if not result.get(COMPLETE):
            self._record_stop(trial)
        elif self._reports is not None:  # processed when Tune asks next: here Tune passes no wrapper
            self._reports.hold(trial, result)
            return
        self._end(trial)
        if self._budget_spent is None:
            self._inner.on_trial_complete(controller, trial, with_units(self._spec, result))

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        """Handle a trial that was stopped while it waited."""
        self._record_stop(trial)
        self._end(trial)
        if self._budget_spent is None:
            self._inner.on_trial_remove(controller, trial)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        """Handle a failed attempt. Tune calls this before it restarts the trial, and when no attempt is left.

        A trial that restarts has the status ERROR at this time; a trial that has failed for good still has its own. If
        the sweep ends here, the state of this iteration is not saved: the failure does not count after a resume.
        """
        self._check_failure(trial)
        if self._reports is not None:
            self._reports.drop(trial)
        if trial.status == Trial.ERROR:
            return
        if self._spec.search.learns:
            report_failure(controller.search_alg.searcher, self._inner, trial, self._paths_of(trial))
        self._end(trial)
        if self._budget_spent is None:
            self._inner.on_trial_error(controller, trial)

    def choose_trial_to_run(self, controller: Any) -> Any:
        """Return the next trial to start or resume. Tune calls this ten times a second."""
        if self._reports is not None and controller.search_alg.is_finished():
            self._reports.await_no_more()
        self._process_due_reports(controller)
        if self._check_budget(controller):
            for trial in [*controller.get_trials()]:
                if trial.status in (Trial.PENDING, Trial.PAUSED):
                    controller.stop_trial(trial)
            return None
        if self.takes_turns:
            chosen = self._next_by_turns(controller)
        else:
            trials = controller.get_trials()
            self.steering.say_if_all_wait(trials)
            chosen = next_in_order(trials, self._num_slots, self.steering.held, ACTIVE)
        if chosen is not None and chosen.status == Trial.PAUSED:
            self._resume(chosen)
        return chosen

    def _next_by_turns(self, controller: Any) -> Any:
        trials = controller.get_trials()
        if sum(trial.status in ACTIVE for trial in trials) >= self._num_slots:
            return None
        chosen = self._waiting.first_unstarted(trials) or self._inner.choose_trial_to_run(controller)
        self._stuck_watch.look(trials, chosen)
        return chosen

    def _pauses_on_request(self, controller: Any, trial: Any) -> bool:
        """Have a trial that reports pause, if somebody has asked for it."""
        if self.steering.leaves(trial) != "pause":
            return False
        self._wait(trial, self.steering.pause(trial, controller))
        return True

    def is_spent(self) -> bool:
        """Return whether the budget is spent."""
        return self._budget_spent is not None

    def set_aside(self, trial: Any) -> None:
        """Note that a trial is paused by request while it waits for a slot."""
        if self._reports is not None:
            self._reports.set_aside(trial)

    def rejoin(self, trial: Any) -> None:
        """Note that a trial that was paused by request will continue."""
        if self._reports is not None:
            self._reports.rejoin(trial, self._steps.get(trial.trial_id, 0))

    def take_over(self, record: SweepRecord) -> None:
        """Go on with a record that has more trials or another budget."""
        self._record, self._spec = record, record.info.spec
        self._budget.budget = self._spec.search.budget
        self.controller.search_alg.extend(self._spec.search)
        if self._reports is not None:
            self._reports.expect(record.info.num_trials)

    def debug_string(self) -> str:
        """Return the description that Tune prints."""
        return str(self._inner.debug_string())

    def _restore(self) -> None:
        """Restore the state of the previous driver, once all of its trials are known again."""
        rule, frozen, self._frozen = self._inner, self._frozen, None
        assert frozen is not None
        state = thaw(frozen, self.trials)
        self._decisions.keep(state.pop("_num_decisions"))
        self.__dict__.update(state)
        if isinstance(rule, JudgedTogether):
            rule.take_over(self._inner)
            self._inner = rule
        if self._reports is not None:
            self._reports.resume(self._num_slots, self._record.info.num_trials, self.trials)
        self._budget.budget = self._spec.search.budget  # a resume may have changed it

    def _set_first_status(self, trial: Any) -> None:
        """Set the status of a trial that Tune is about to add: it may have ended, wait for others or for a slot.

        Tune's state does not hold the end of a trial that was stopped while it waited (ray 2.60,
        `_schedule_trial_stop`).
        """
        if self.why_stopped(trial.trial_id) is not None and self._paths_of(trial).result.is_file():
            trial.set_status(Trial.TERMINATED)
            return
        is_held = self._holds_new_trials or trial.trial_id in self.steering.unstarted
        self._waiting.set_first_status(trial, is_held)

    def _wait(self, trial: Any, why: str | None) -> None:
        """Have a trial wait and give its slot back."""
        self._waiting.wait(trial)
        if why is not None:
            self.log(trial, "paused", why)

    def _resume(self, trial: Any) -> None:
        """Have a trial that waits continue, or start."""
        self.steering.unstarted.discard(trial.trial_id)
        if self._waiting.start(trial):
            kind, step = self._spec.scheduler.kind, self._steps[trial.trial_id]
            self.log(trial, "resumed", f"{kind}: continues from step {step}")

    def _record_stop(self, trial: Any) -> None:
        """Record the end of a trial that was not decided at its own report.

        The budget is spent; or the Tune scheduler stops the trial while another one reports; or the driver that stopped
        it was lost before it could save that, and the trial's result exists already.
        """
        trial_id, paths = trial.trial_id, self._paths_of(trial)
        if self.why_stopped(trial_id) is not None:
            return
        ended = read_result(paths) if paths.result.is_file() else None
        if ended is not None and ended.stopped is not None:
            self._steps[trial_id] = ended.step
            self.log(trial, "stopped", ended.stopped)
        elif trial_id in self._steps:
            self.log(trial, "stopped", str(self._budget_spent or why_stopped(self._spec, trial.last_result)))

    def _end(self, trial: Any) -> None:
        """Forget that a trial waits: it has ended."""
        if self._reports is not None:
            self._reports.end(trial)
        self.steering.end(trial.trial_id)
        self._waiting.end(trial)

    def _paths_of(self, trial: Any) -> TrialPaths:
        return self._record.paths.trial(trial.trial_id)

    def _count_spending(self, trial: Any) -> None:
        if self._budget.needs_records:
            self._budget.count(read_trial(self._paths_of(trial), self._record.info))

    def _check_budget(self, controller: Any) -> BudgetSpent | None:
        """Return the limit of the budget that is reached, or None. End the search once it is reached."""
        if self._budget_spent is None:
            self._budget_spent = record_spent(self._budget, self._record.paths)
        if self._budget_spent is not None:
            controller.search_alg.set_finished()
        return self._budget_spent

    def log(self, trial: Any, action: Action, why: str, donor: str | None = None) -> None:
        """Record a decision about a trial."""
        step = self._steps.get(trial.trial_id, 0)
        self._decisions.add(Decision(trial_id=trial.trial_id, step=step, action=action, why=why, donor=donor))


_SAVED_ATTRIBUTES = ("_inner", "_steps", "_budget", "_reports")
