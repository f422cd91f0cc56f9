"""Take up what people ask of a running sweep: stop, pause and continue trials, add trials, extend the sweep.

A request takes effect, and its answer is saved, in the same iteration of Tune's loop, at whose end a snapshot is
written. A driver that is killed before the snapshot takes the request up again, and one that is killed after it finds
the answer in its state. So each request takes effect once.
"""

import shutil
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol, assert_never

from ray.tune.experiment import Trial

from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.record import AddedTrial, SweepRecord, read_trial, write_info, write_record
from orchestrator.record.extend import extend_sweep, save_extension
from orchestrator.record.held import say_only_paused
from orchestrator.record.models import time_now
from orchestrator.record.requests import (
    Request,
    RequestAnswer,
    read_request,
    share_folder,
    unanswered,
    write_answer,
)
from orchestrator.sweep.schedulers.added_trial import added_trial, copy_adapter, donor_values, wanted_trial

_LOOK_S = 0.5
"""Seconds between two looks for new requests."""

Leave = Literal["stop", "pause"]


class Steered(Protocol):
    """What steering needs of the scheduler that Tune asks."""

    trials: dict[str, Any]
    """Trial -> Tune's trial."""
    takes_turns: bool
    """Whether the scheduler has trials wait for each other."""
    controller: Any
    """Tune's wrapper of its controller; None until a trial is known."""

    def is_spent(self) -> bool:
        """Return whether the budget is spent."""
        ...

    def log(self, trial: Any, action: Literal["added", "stopped"], why: str) -> None:
        """Record a decision about a trial."""
        ...

    def set_aside(self, trial: Any) -> None:
        """Note that a trial is paused by request while it waits for a slot."""
        ...

    def rejoin(self, trial: Any) -> None:
        """Note that a trial that was paused by request will continue."""
        ...

    def take_over(self, record: SweepRecord) -> None:
        """Go on with a record that has more trials or another budget."""
        ...


class Steering:
    """The requests of a sweep, and the trials that they concern. Its state is saved with the scheduler's."""

    def __init__(self, record: SweepRecord, say: Callable[[str], None], saved: dict[str, Any] | None) -> None:
        """
        Args:
            record: the sweep's record.
            say: called with messages for the user who runs the sweep.
            saved: the last `state` of the previous driver; None if there is none.
        """
        saved = saved or {}
        self.held: set[str] = saved.get("held", set())
        """Trials that are paused by request. They get no slot until somebody has them go on."""
        self.unstarted: set[str] = saved.get("unstarted", set())
        """Trials that were added by request and have not begun."""
        self.stopped_by: dict[str, str] = saved.get("stopped_by", {})
        """Trial -> who has asked for its stop."""
        self._leaving: dict[str, tuple[Leave, str]] = saved.get("leaving", {})
        """Trial that stops or pauses at its next evaluation -> which of both, and who has asked."""
        self._answers: dict[str, dict[str, Any]] = saved.get("answers", {})
        """Request -> its answer."""
        self._unwritten: list[RequestAnswer] = []
        self._record, self._say = record, say
        self._has_new, self._looked_s = True, 0.0
        self._has_said_why = False
        share_folder(record.paths)

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: Tune pickles a tuner with its scheduler, and each driver replaces it by its own."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return the state that a resume needs."""
        return {
            "held": self.held,
            "unstarted": self.unstarted,
            "stopped_by": self.stopped_by,
            "leaving": self._leaving,
            "answers": self._answers,
        }

    def take_up(self, sweep: Steered) -> bool:
        """Carry out all requests that have no answer, in their order.

        Call it before Tune asks the search for trials. The answers are written by `write_answers`.

        Returns:
            Whether answers wait for a snapshot.
        """
        if sweep.controller is None:
            return False
        for name, (leave, _) in [*self._leaving.items()]:  # asked while the checkpoint of a pause was written
            if leave == "stop" and (trial := sweep.trials.get(name)) is not None and trial.status == Trial.PAUSED:
                self._stop_waiting(trial, sweep)
        if not self._has_new:
            return False
        for name in unanswered(self._record.paths):
            if name in self._answers:  # carried out by a driver that was killed before it wrote the answer
                self._unwritten.append(RequestAnswer.model_validate(self._answers[name]))
            else:
                self._answer(name, sweep)
        self._has_new = sweep.controller.search_alg.hold_open = False
        return bool(self._unwritten)

    def _answer(self, name: str, sweep: Steered) -> None:
        """Carry out a request, and keep the answer until the snapshot is written."""
        new, asked = None, name
        try:
            request = read_request(self._record.paths, name)
            asked = f"{request.by} asks: {_phrase(request)}"
            text, is_accepted = self._carry_out(request, sweep), True
            new = request.new_trial if request.verb in ("add", "clone") else None
        except OrchestratorError as error:
            text, is_accepted = str(error), False
        answer = RequestAnswer(name=name, is_accepted=is_accepted, text=text, answered=time_now(), trial_id=new)
        self._answers[name] = answer.model_dump()
        self._unwritten.append(answer)
        self._say(f"{asked}: {'' if is_accepted else 'refused: '}{text}")

    def write_answers(self) -> None:
        """Write the answers. Call it once a snapshot holds them and the effects of their requests."""
        for answer in self._unwritten:
            write_answer(self._record.paths, answer)
        self._unwritten = []

    def look(self, sweep: Steered) -> None:
        """Look for new requests now and then."""
        if sweep.controller is not None and time.monotonic() > self._looked_s + _LOOK_S:
            self._looked_s = time.monotonic()
            self._has_new = bool(unanswered(self._record.paths))
            sweep.controller.search_alg.hold_open = self._has_new

    @property
    def num_trials(self) -> int:
        """Number of trials of the sweep, with those that were added by now."""
        return self._record.info.num_trials

    def leaves(self, trial: Any) -> Leave | None:
        """Return whether a trial that reports is to be stopped or paused, as somebody has asked."""
        leave, _ = self._leaving.get(trial.trial_id, (None, ""))
        return leave

    def stop(self, trial: Any, controller: Any) -> str:
        """Note that a trial stops now; return the reason. The searcher learns nothing from it."""
        _, by = self._leaving.pop(trial.trial_id)
        self.stopped_by[trial.trial_id] = by
        controller.search_alg.forget(trial.trial_id)
        return f"stopped on request of {by}"

    def pause(self, trial: Any, controller: Any) -> str:
        """Note that a trial pauses now; return the reason. Another trial may take its slot."""
        _, by = self._leaving.pop(trial.trial_id)
        self._hold(trial.trial_id)
        self._record.paths.trial(trial.trial_id).pausing.unlink(missing_ok=True)
        controller.search_alg.set_aside(trial.trial_id)
        return f"paused on request of {by}"

    def end(self, trial_id: str) -> None:
        """Forget a trial that has ended."""
        self._leaving.pop(trial_id, None)
        self._let_go(trial_id)
        self.unstarted.discard(trial_id)

    def say_if_all_wait(self, trials: list[Any]) -> None:
        """Say once that nothing is left to do but trials that are paused by request."""
        open_trials = [trial for trial in trials if not trial.is_finished()]
        if not open_trials or any(trial.trial_id not in self.held for trial in open_trials):
            self._has_said_why = False
        elif not self._has_said_why:
            self._has_said_why = True
            sentence = say_only_paused(self._record, [trial.trial_id for trial in open_trials])
            self._say(f"{sentence}; or end the command with Ctrl-C: a resume keeps them paused")

    def _carry_out(self, request: Request, sweep: Steered) -> str:
        """Carry out a request, and return what has been done.

        Raises:
            OrchestratorError: the request is refused; the message says why.
        """
        match request.verb:
            case "stop":
                return self._stop(request, sweep)
            case "pause":
                return self._pause(request, sweep)
            case "go-on":
                return self._go_on(request, sweep)
            case "extend":
                return self._extend(request, sweep)
            case "add" | "clone":
                try:
                    return self._add(request, sweep)
                except OrchestratorError:
                    self._withdraw(request.new_trial, sweep)
                    raise
            case _:
                assert_never(request.verb)

    def _stop(self, request: Request, sweep: Steered) -> str:
        trial = _open_trial(request, sweep)
        name = trial.trial_id
        self._leaving[name] = "stop", request.by
        self._record.paths.trial(name).pausing.unlink(missing_ok=True)
        if trial.status in (Trial.PENDING, Trial.PAUSED):
            self._stop_waiting(trial, sweep)
            return f"{name} is stopped"
        if name in self.held:
            return f"{name} stops once the checkpoint of its pause is written"
        return f"{name} stops at its next evaluation"

    def _stop_waiting(self, trial: Any, sweep: Steered) -> None:
        """Stop a trial that has no slot."""
        sweep.log(trial, "stopped", self.stop(trial, sweep.controller))
        sweep.controller.stop_trial(trial)

    def _pause(self, request: Request, sweep: Steered) -> str:
        trial = _open_trial(request, sweep)
        name = trial.trial_id
        if sweep.takes_turns:
            kind = self._record.info.spec.scheduler.kind
            raise RequestError(
                f"{name}: scheduler {kind} has trials wait for each other, and all would wait for a paused one",
                "Stop the trial, or let it train on.",
            )
        if name in self.held:
            raise RequestError(f"{name}: is paused already")
        if self.leaves(trial) == "stop":
            raise RequestError(f"{name}: stops at its next evaluation, as somebody has asked")
        if trial.status == Trial.PAUSED:  # it waits for a slot
            self._hold(name)
            sweep.controller.search_alg.set_aside(name)
            sweep.set_aside(trial)
            return f"{name} is paused"
        self._leaving[name] = "pause", request.by
        self._record.paths.trial(name).root.mkdir(parents=True, exist_ok=True)
        self._record.paths.trial(name).pausing.touch()
        return f"{name} pauses at its next evaluation"

    def _go_on(self, request: Request, sweep: Steered) -> str:
        trial = _open_trial(request, sweep)
        name = trial.trial_id
        if self.leaves(trial) == "pause":
            del self._leaving[name]
            self._record.paths.trial(name).pausing.unlink(missing_ok=True)
            return f"{name} trains on without a pause"
        if name not in self.held:
            raise RequestError(f"{name}: is not paused by a request, so there is nothing to continue")
        if self.leaves(trial) == "stop":
            raise RequestError(f"{name}: stops once the checkpoint of its pause is written, as somebody has asked")
        self._let_go(name)
        sweep.controller.search_alg.take_back(name)
        sweep.rejoin(trial)
        return f"{name} goes on as soon as a slot is free"

    def _extend(self, request: Request, sweep: Steered) -> str:
        if any(change.request == request.name for change in self._record.info.changes):
            sweep.take_over(self._record)  # saved by a driver that was killed before its snapshot
            return "the sweep is extended"
        if over := self._record.why_over():
            raise RequestError(
                f"{over}; the sweep can be extended once its running trials have ended",
                "Give the same command again then.",
            )
        record = extend_sweep(self._record, request.num_trials, request.budget, request.name)
        save_extension(record)
        self._record = record
        sweep.take_over(record)
        changes = [f"{each.field} {each.before} -> {each.after}" for each in record.info.changes if each.request]
        return f"the sweep is extended: {', '.join(changes[-len(request.budget) - bool(request.num_trials) :])}"

    def _add(self, request: Request, sweep: Steered) -> str:
        if sweep.takes_turns:
            kind = self._record.info.spec.scheduler.kind
            raise RequestError(
                f"scheduler {kind} compares trials that begin together; a later one would have none to compare with",
                "Start a new sweep, for example with scheduler.kind: asha.",
            )
        if sweep.is_spent():
            raise RequestError("the budget is spent; no trial can be added", "Raise it first: orchestrator extend.")
        record, name = self._record, request.new_trial
        paths = record.paths.trial(name)
        values, origin = dict(request.values), None
        if request.trial_id is not None:
            donor = read_trial(record.paths.trial(request.trial_id), record.info)
            values, origin = donor_values(record, donor) | values, donor.trial_id
        wanted = wanted_trial(record.info.spec, values)
        if request.trial_id is not None and request.warm:
            origin = copy_adapter(record, donor, wanted.config, paths)
        added = AddedTrial(request=request.name, by=request.by, values=wanted.values, cloned_from=origin)
        write_record(paths.added, added)
        if name not in record.info.added:
            info = record.info.model_copy(update={"added": [*record.info.added, name]})
            write_info(record.paths, info)
            self._record = SweepRecord(record.paths, info)
        self.unstarted.add(name)
        sweep.take_over(self._record)
        trial = added_trial(next(iter(sweep.trials.values())), name, wanted.values)
        sweep.controller.search_alg.take_in(name, wanted.point)
        sweep.controller.add_trial(trial)
        of = f", a clone of {origin}" if origin else ""
        why = f"added on request of {request.by}{of}"
        sweep.log(trial, "added", why)
        note = (
            ""
            if wanted.point is not None
            else "; its values are outside the search space, so the search does not learn from it"
        )
        return f"trial {name} is added{of}; it begins as soon as a slot is free{note}"

    def _withdraw(self, name: str, sweep: Steered) -> None:
        """Remove what a driver that was killed before its snapshot has written of a trial that is now refused."""
        record = self._record
        if name in sweep.trials:
            return
        if name in record.info.added:
            info = record.info.model_copy(update={"added": [each for each in record.info.added if each != name]})
            write_info(record.paths, info)
            self._record = SweepRecord(record.paths, info)
            sweep.take_over(self._record)
        shutil.rmtree(record.paths.trial(name).root, ignore_errors=True)

    def _hold(self, name: str) -> None:
        self.held.add(name)
        self._record.paths.trial(name).held.touch()

    def _let_go(self, name: str) -> None:
        self.held.discard(name)
        self._record.paths.trial(name).held.unlink(missing_ok=True)


def _open_trial(request: Request, sweep: Steered) -> Any:
    """Return the Tune trial that a request names.

    Raises:
        RequestError: it is unknown or has ended.
    """
    trial = sweep.trials.get(request.trial_id or "")
    if trial is None:
        raise RequestError(f"{request.trial_id}: the sweep has no such trial, or it has been lost with a driver")
    if trial.is_finished():
        raise RequestError(f"{request.trial_id}: the trial has ended already")
    return trial


def _phrase(request: Request) -> str:
    values = ", ".join(f"{path} {value}" for path, value in request.values.items())
    return " ".join(part for part in (request.verb, request.trial_id, values) if part)
