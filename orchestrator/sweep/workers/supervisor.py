"""Supervise the workers of a sweep. Runs in a thread of the driver, named `supervisor`.

It opens each worker, again after each restart and with growing pauses; ends workers that hang; has workers write
checkpoints whose node is about to go away; and notes why the sweep cannot go on once no worker can start. Each of these
is said and recorded in `faults.jsonl`. Workers that hold one base in pieces are a group: they retire together, and if
one is given up, so are the others.
"""

import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import upstream
from orchestrator.errors import OrchestratorError, StorageError, SweepError
from orchestrator.record import SweepPaths
from orchestrator.record.faults import Fault, append_fault
from orchestrator.spec.sections import ResourcesSection
from orchestrator.storage import storage_fault
from orchestrator.sweep.workers.losses import why_lost
from orchestrator.sweep.workers.pulse import ProcessId, Pulse
from orchestrator.sweep.workers.worker import SAVING_S
from orchestrator.sweep.workers.worker_client import Workers
from orchestrator.training.fast.shard.place import GroupLost

_PERIOD_S = 1.0
_FIRST_PERIOD_S = 0.2
"""Period until a worker is open, for which the sweep may wait."""
_STOP_S = 5.0
_LONGEST_PAUSE_S = 60.0
"""Longest pause before a worker is opened again, in seconds."""
_HANG_S = 600.0
_FIRST_HANG_S = 1800.0
_HANG_FACTOR = 20.0
_LOG_LINES = 5


@dataclass
class _Member:
    """One worker, as the supervisor knows it."""

    handle: Any
    number: int
    pulse: Pulse | None = None
    """Its last answer."""
    asked: Any = None
    """Reference to the answer that is awaited."""
    asked_at: float = 0.0
    opening: Any = None
    """Reference to the end of `Worker.open`, while that runs."""
    slots: int | None = None
    """Trials at a time in it, by its own answer."""
    is_placed: bool = False
    """Whether its process has been started at least once."""
    open_at: float = 0.0
    """Time before which it is not opened, by time.monotonic."""
    num_restarts: int = 0
    """Restarts that have been handled."""
    in_a_row: int = 0
    """Restarts without a step in between."""
    retiring: Any = None
    """Reference to the end of `Worker.retire`; its node goes away."""
    is_gone: bool = False
    """Whether it is given up."""
    cause: str | None = None
    """Why the supervisor has ended its process."""


class Supervisor:
    """Watches the workers of a sweep from a thread of its own."""

    def __init__(
        self,
        workers: Workers,
        paths: SweepPaths,
        resources: ResourcesSection,
        say: Callable[[str], None],
        num_shards: int = 1,
    ) -> None:
        """
        Args:
            workers: the workers of the sweep.
            paths: the sweep's paths.
            resources: of the experiment.
            say: called with a message about each fault, from the thread.
            num_shards: workers that hold one base in pieces; they follow each other in `workers`.
        """
        self._num_shards = num_shards
        self._workers = workers
        self._paths = paths
        self._resources = resources
        self._say = say
        self._members = [_Member(handle, number) for number, handle in enumerate(workers.handles)]
        self._stopped = threading.Event()
        self._fault: OrchestratorError | None = None
        self._first_slots: tuple[int, str] | None = None
        """What the first worker that opened has answered."""
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Open the workers, and start the thread, which opens them again after restarts."""
        for member in self._members:
            member.opening = self._workers.open(member.handle)
        self._thread.start()

    def first_slots(self) -> tuple[int, str]:
        """Wait until a worker is open, and return its answer: its slots, and why there are not more.

        The others are equal to it, or wait for resources.

        Raises:
            OrchestratorError: no worker can be opened.
        """
        while self._first_slots is None:
            if self._fault is not None:
                raise self._fault
            time.sleep(_FIRST_PERIOD_S / 4)
        return self._first_slots

    def all_slots(self, timeout_s: float) -> list[int]:
        """Return the slots of each worker. Those that wait for resources count as the first one that has opened.

        Args:
            timeout_s: time to wait for the workers that have been started, in seconds.

        Raises:
            OrchestratorError: as in `first_slots`.
        """
        (first, _), deadline = self.first_slots(), time.monotonic() + timeout_s
        while self._fault is None and time.monotonic() < deadline and any(map(_is_opening, self._members)):
            time.sleep(_FIRST_PERIOD_S / 4)
        return [first if member.slots is None else member.slots for member in self._members if not member.is_gone]

    def fault(self) -> OrchestratorError | None:
        """Return why the sweep cannot go on; None while it can."""
        return self._fault

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(_STOP_S)

    def look(self, now: float) -> None:
        """Look at all workers once.

        Args:
            now: the time, by time.monotonic.
        """
        stalled_s, self._looked = now - self._looked - _PERIOD_S, now
        if stalled_s > _PERIOD_S:  # this process itself was stopped: the workers are not to blame
            for member in self._members:
                member.asked_at += stalled_s
        draining = upstream.draining_nodes()
        for member in self._members:
            if not member.is_gone:
                self._look(member, now, draining)

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self._period_s()) and self._fault is None:
                with suppress(RayError, OSError):  # Ray or the disk fails for a moment, or for good: others report that
                    self.look(time.monotonic())
        except Exception as error:  # unwatched, a sweep could wait for ever
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._fault = SweepError(
                f"the supervision of the workers has failed in {place.name}, line {place.lineno}: "
                f"{type(error).__name__}: {error}",
                f"All results are kept; continue with: orchestrator resume {self._paths.root}",
            )

    def _period_s(self) -> float:
        return _FIRST_PERIOD_S if self._first_slots is None else _PERIOD_S

    def _look(self, member: _Member, now: float, draining: set[str]) -> None:
        state = upstream.actor_state(member.handle)
        if state is None or state.state in ("DEPENDENCIES_UNREADY", "PENDING_CREATION"):
            return
        if state.num_restarts > member.num_restarts or state.state == "DEAD":
            self._take_loss(member, state, now)
        member.is_placed |= state.state == "ALIVE"
        if not member.is_gone and state.state == "ALIVE" and member.opening is not None:
            self._take_opening(member)
        if member.is_gone or state.state != "ALIVE":
            return
        if state.node_id in draining and member.retiring is None:
            self._retire(member, "its node is about to go away (drained or preempted)")
        elif member.retiring is not None:
            self._end_retired(member, now)
        elif member.asked is None:
            member.asked, member.asked_at = member.handle.pulse.remote(), now
        else:
            self._take_answer(member, state, now)

    def _take_loss(self, member: _Member, state: upstream.ActorState, now: float) -> None:
        """Handle the death of a worker's process: record it, and decide when its successor is opened."""
        before, cause = member.pulse, member.cause or why_lost(state.cause)
        lost = max(state.num_restarts - member.num_restarts, 1)
        was_retiring = member.retiring is not None
        progressed = was_retiring or (before is not None and before.has_stepped)
        member.in_a_row = 1 if progressed else member.in_a_row + lost
        member.num_restarts, member.pulse, member.cause = state.num_restarts, None, None
        member.asked = member.opening = member.retiring = None
        limit = self._resources.max_restarts
        if member.in_a_row > limit or state.state == "DEAD":
            times = f"died {counted_times(member.in_a_row)} in a row without a step"
            then = f"given up: it {times}" if member.in_a_row > limit else "given up: Ray does not restart it"
            then += self._give_up(member)
        else:
            pause_s = 0.0 if progressed else min(2.0 ** (member.in_a_row - 1), _LONGEST_PAUSE_S)
            member.open_at = now + pause_s
            then = "restarts" + (f" in {pause_s:g} s" if pause_s else "")
        self._record(before.process if before else None, cause, then)
        if all(each.is_gone for each in self._members):
            self._fault = self._none_left(f"the last one {then.removeprefix('given up: it ')}: {cause}")

    def _give_up(self, member: _Member) -> str:
        """End a worker for good, with the others of its group; return what to add to the message about it."""
        given_up = [each for each in self._group(member) if not each.is_gone]
        for each in given_up:
            each.is_gone = True
            with suppress(RayError):
                ray.kill(each.handle)
        return "" if len(given_up) == 1 else ", with the workers that hold the other pieces of its base"

    def _none_left(self, why: str) -> SweepError:
        return SweepError(
            f"no worker is left; {why}{self._last_lines()}",
            f"The workers' logs: {self._paths.workers}. When the cause is mended, continue with: "
            f"orchestrator resume {self._paths.root}",
        )

    def _group(self, member: _Member) -> list[_Member]:
        """Return the workers that hold one base in pieces together with this one, which is among them."""
        first = member.number - member.number % self._num_shards
        return self._members[first : first + self._num_shards]

    def _take_answer(self, member: _Member, state: upstream.ActorState, now: float) -> None:
        """Look at the answer to a question, or at how long it has not come."""
        done, _ = ray.wait([member.asked], timeout=0)
        if not done:
            silent_s, limit_s = now - member.asked_at, self._hang_s(member.pulse)
            if member.pulse is not None and silent_s > limit_s:
                self._end(member, state, member.pulse.process, f"no answer for {silent_s:.0f} s")
            return
        asked, member.asked = member.asked, None
        try:
            pulse: Pulse = ray.get(asked)
        except RayActorError:  # the table of actors tells it next time
            return
        member.pulse = pulse
        if pulse.is_busy and pulse.idle_s > self._hang_s(pulse):
            longest = f"; the longest pause before was {pulse.longest_s:.0f} s" if pulse.has_stepped else ""
            self._end(member, state, pulse.process, f"no step and no evaluation for {pulse.idle_s:.0f} s{longest}")
        elif pulse.is_retired and self._num_shards > 1:  # by a signal; otherwise it ends by itself
            self._retire(member, "a process that holds a piece of its base is about to end")
        elif not pulse.is_open and member.opening is None and now >= member.open_at:
            member.opening = self._workers.open(member.handle)

    def _take_opening(self, member: _Member) -> None:
        """Look at the end of `Worker.open`, if it has come."""
        done, _ = ray.wait([member.opening], timeout=0)
        if not done:
            return
        opening, member.opening = member.opening, None
        try:
            slots: tuple[int, str] = ray.get(opening)
        except RayTaskError as error:
            self._take_refusal(member, error)
        except RayActorError:  # the table of actors tells it next time
            return
        else:
            self._first_slots, member.slots = self._first_slots or slots, slots[0]

    def _take_refusal(self, member: _Member, error: RayTaskError) -> None:
        """Handle the error of a worker whose process lives, but that could not be opened."""
        cause = error.cause
        if isinstance(cause, GroupLost):  # the others of the group may come later
            member.cause = str(cause)
            with suppress(RayError):
                ray.kill(member.handle, no_restart=False)
        elif fault := storage_fault(cause):
            self._fault = StorageError(
                f"{self._paths.root}: a worker cannot be opened because its storage fails: {fault}",
                f"Free some space or repair the storage, then continue with: orchestrator resume {self._paths.root}",
            )
        else:  # another attempt would fail likewise, but workers on other nodes may be sound
            text = cause.message if isinstance(cause, OrchestratorError) else str(error).strip().splitlines()[-1]
            then = f"given up: it could not be opened{self._give_up(member)}"
            self._record(member.pulse.process if member.pulse else None, text, then)
            if all(each.is_gone for each in self._members):
                is_ours = isinstance(cause, OrchestratorError)
                self._fault = cause if is_ours else self._none_left(f"the last one could not be opened: {text}")

    def _hang_s(self, pulse: Pulse | None) -> float:
        """Return the seconds without a sign of progress after which a worker counts as hung."""
        return hang_s(self._resources.hang_minutes, pulse)

    def _end(self, member: _Member, state: upstream.ActorState, process: ProcessId, why: str) -> None:
        """End the process of a worker that hangs. Ray starts another one."""
        member.cause, member.asked = f"it hung: {why}", None
        self._say(f"worker {process}: it hangs: {why}; ended, and its trials continue elsewhere")
        task = ray.remote(num_cpus=0, max_retries=0)(_end_process)
        on_node = NodeAffinitySchedulingStrategy(state.node_id, soft=False)
        ray.wait([task.options(scheduling_strategy=on_node).remote(process)], timeout=SAVING_S)
        with suppress(RayError):
            ray.kill(member.handle, no_restart=False)

    def _retire(self, member: _Member, why: str) -> None:
        """Have the trials of a worker, and of the others of its group, write checkpoints and go on elsewhere."""
        for each in self._group(member):
            if each.retiring is None and not each.is_gone:
                each.retiring, each.asked_at = each.handle.retire.remote(why, SAVING_S), time.monotonic()
                process = each.pulse.process if each.pulse else None
                self._say(
                    f"worker {process or '(starting)'}: {why}; its trials write checkpoints and continue elsewhere"
                )
                each.cause = why

    def _end_retired(self, member: _Member, now: float) -> None:
        """End a worker that has retired, so that Ray starts it on another node.

        Trials of its group need it until they have written their checkpoints.
        """
        retiring = [each.retiring for each in self._group(member) if each.retiring is not None]
        done, _ = ray.wait(retiring, num_returns=len(retiring), timeout=0)
        if len(done) == len(retiring) or now > member.asked_at + 2 * SAVING_S:
            with suppress(RayError):
                ray.kill(member.handle, no_restart=False)

    def _record(self, process: ProcessId | None, cause: str, then: str) -> None:
        fault = Fault(worker=str(process) if process else None, cause=cause, then=then)
        with suppress(OSError):  # on a full disk the trials end the sweep
            append_fault(self._paths, fault)
        self._say(str(fault))

    def _last_lines(self) -> str:
        """Return the last lines of the newest log of a worker."""
        logs = sorted(self._paths.workers.glob("*.log"), key=lambda log: log.stat().st_mtime_ns)
        lines = tail(logs[-1]) if logs else []
        return "".join(f"\n    {line}" for line in lines)


def hang_s(setting: float | Literal["auto"], pulse: Pulse | None) -> float:
    """Return the seconds without a sign of progress after which a worker counts as hung.

    Args:
        setting: `resources.hang_minutes`.
        pulse: the worker's last answer; None before the first.
    """
    if setting != "auto":
        has_stepped = pulse is not None and pulse.has_stepped
        return 60 * setting if has_stepped else max(60 * setting, _FIRST_HANG_S)
    if pulse is None or not pulse.has_evaluated:
        return _FIRST_HANG_S
    return max(_HANG_S, _HANG_FACTOR * pulse.longest_s)


def tail(log: Path) -> list[str]:
    """Return the last lines of a log that are not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-_LOG_LINES:]


def counted_times(number: int) -> str:
    """Return how often something has happened, in words."""
    return "once" if number == 1 else f"{number} times"


def _end_process(process: ProcessId) -> bool:
    """End a process of the node on which this task runs."""
    return process.end()


def _is_opening(member: _Member) -> bool:
    """Return whether a worker has been started and has not said how many slots it has."""
    return member.is_placed and member.slots is None and not member.is_gone
