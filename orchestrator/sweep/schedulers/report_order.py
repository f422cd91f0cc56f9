"""The order in which a scheduler sees the reports of trials that run side by side.

Reports of trials that train at the same pace arrive in an order that depends on the machine. A rule such as ASHA's,
which compares a report with earlier ones, would decide differently in every run. So a report waits until all trials
beside it have reached the same time, and reports of the same time are judged together. The workers
keep training meanwhile.

This is a conservative discrete-event simulation (Chandy and Misra, IEEE TSE 5(5), 1979). Its clock, called simulated
time here, counts optimizer steps since the start of the sweep, as if all trials trained at the same pace and each took
its slot at the time at which an earlier trial left it.
"""

from bisect import insort
from dataclasses import dataclass, field
from typing import Any

MIN_PATIENCE_S = 60.0
"""Shortest time that a report waits for trials that are behind, in seconds."""

PATIENCE = 0.25
"""A report waits longer if `MIN_PATIENCE_S` is less than this fraction of the time for which its trial has run."""

PACE = 2.0
"""A report does not wait for a trial whose steps take this many times as long: it would wait at every report."""


@dataclass
class _Running:
    """A trial that has a slot."""

    start: int | None = None
    """Simulated time at which the trial took its slot; None while it is not known."""
    step: int = 0
    """Step of its last report."""
    reported_s: float | None = None
    """When that report arrived, if it waits."""
    ran_s: float = 0.0
    """Seconds for which the trial had run by then, on its worker."""
    has_ended: bool = False
    """Whether its slot is free again, from a simulated time that is not known yet."""
    is_overdue: bool = False
    """Whether, since its last report, another report has waited for this trial in vain."""

    @property
    def sim_time(self) -> int:
        """Simulated time of its last report. The start of the trial must be known."""
        assert self.start is not None
        return self.start + self.step

    def holds_up(self, other: "_Running") -> bool:
        """Return whether another trial's report waits for this trial: it is behind, and likely to catch up."""
        is_slow = self.ran_s * other.step > PACE * other.ran_s * self.step
        return not self.is_overdue and not is_slow and self.sim_time < other.sim_time


@dataclass
class ReportOrder:
    """The trials of a sweep and the order of their waiting reports. All times in seconds are of one clock."""

    num_slots: int
    num_trials: int
    """Number of trials of the sweep. If fewer come, reports wait in vain for the others once."""
    _index: dict[str, int] = field(default_factory=dict)
    """Trial -> its position in the order in which trials were added, which is the order in which they start."""
    _unplaced: list[str] = field(default_factory=list)
    """Trials whose start is not known yet, in that order."""
    _running: dict[str, _Running] = field(default_factory=dict)
    _rejoined: dict[str, int] = field(default_factory=dict)
    """Trials that were paused and wait for a slot -> the step from which they continue."""
    _overdue_at: int | None = None
    """Number of trials that had been placed when a report had waited in vain for the next one."""
    _free: list[int] = field(init=False)
    """Simulated times from which slots are free, ascending."""

    def __post_init__(self) -> None:
        self._free = [0] * self.num_slots

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state, also of a version without `_rejoined`."""
        self.__dict__.update({"_rejoined": {}} | state)

    def set_aside(self, trial: str) -> None:
        """Leave out a trial that waits for a slot, until `rejoin`: no report waits for it."""
        if trial in self._unplaced and trial not in self._running:
            self._unplaced.remove(trial)
            self._rejoined.pop(trial, None)

    def rejoin(self, trial: str, step: int) -> None:
        """Have a trial that has left its slot continue from a step, once a slot is free."""
        if trial not in self._unplaced and trial not in self._running:
            self._unplaced.append(trial)
            self._rejoined[trial] = step

    def add(self, trial: str) -> None:
        """Add a trial behind those that were added before."""
        if trial not in self._index:
            self._index[trial] = len(self._index)
            self._unplaced.append(trial)

    def await_no_more(self) -> None:
        """Note that the sweep has no other trials than those that were added."""
        self.num_trials = len(self._index)

    def report(self, trial: str, step: int, now_s: float, ran_s: float = 0.0) -> None:
        """Note a trial's report, which waits until `next` returns the trial.

        Args:
            trial: the trial that reports.
            step: its optimizer step.
            now_s: current time, in seconds.
            ran_s: seconds for which the trial has run.
        """
        running = self._running.setdefault(trial, _Running())
        running.step, running.reported_s, running.ran_s, running.is_overdue = step, now_s, ran_s, False

    def is_running(self, trial: str) -> bool:
        """Return whether a trial has reported and has not ended."""
        return trial in self._running

    def processed(self, trial: str) -> None:
        """Note that the scheduler has processed a report and the trial continues."""
        if trial in self._running:
            self._running[trial].reported_s = None

    def end(self, trial: str, step: int | None = None) -> None:
        """Free the slot of a trial, unless it was freed before.

        Args:
            trial: the trial that has ended.
            step: its last step; None for that of its last report.
        """
        if trial not in self._running and trial not in self._unplaced:
            return
        running = self._running.setdefault(trial, _Running())
        running.reported_s, running.has_ended = None, True
        running.step = running.step if step is None else step
        if running.start is not None:
            self._free_slot(trial)

    def resume(self, num_slots: int, num_trials: int) -> None:
        """Continue with other numbers of slots and trials. Waiting reports are dropped: they come again."""
        more, self.num_slots, self.num_trials = num_slots - self.num_slots, num_slots, num_trials
        for _ in range(more):
            insort(self._free, self._earliest() or 0)
        del self._free[max(0, len(self._free) + min(0, more)) :]
        for running in self._running.values():
            running.reported_s = None

    def next(self, now_s: float) -> list[str]:
        """Return the trials whose reports the scheduler must process now, together, in the order of the trials.

        They are the waiting reports of the earliest simulated time. The list is empty while all reports wait for
        others.

        Args:
            now_s: current time, in seconds.
        """
        while self._unplaced and self._may_place(self._unplaced[0]):
            self._place(self._unplaced[0])
        for name in [name for name in self._unplaced if name in self._running]:
            if self._is_out_of_patience(self._running[name], now_s):
                self._place(name)  # the trials before it do not report
        placed = {name: each for name, each in self._running.items() if each.start is not None}
        waiting = [name for name, each in placed.items() if each.reported_s is not None]
        if not waiting:
            return []
        waiting.sort(key=lambda each: (placed[each].sim_time, self._index[each]))
        running = placed[waiting[0]]
        behind = [each for each in placed.values() if each.holds_up(running)]
        if behind or self._awaits_new_trial(running.sim_time):
            if not self._is_out_of_patience(running, now_s):
                return []
            for each in behind:
                each.is_overdue = True
            self._overdue_at = self._num_placed
        return [each for each in waiting if placed[each].sim_time == running.sim_time]

    @property
    def _num_placed(self) -> int:
        return len(self._index) - len(self._unplaced)

    @staticmethod
    def _is_out_of_patience(running: _Running, now_s: float) -> bool:
        since = running.reported_s
        return since is not None and now_s >= since + max(MIN_PATIENCE_S, PATIENCE * running.ran_s)

    def _earliest(self) -> int | None:
        """Return the simulated time after which the next report or end of a trial can come."""
        return min((each.sim_time for each in self._running.values() if each.start is not None), default=None)

    def _awaits_new_trial(self, sim_time: int) -> bool:
        """Return whether a trial has started, or will start, in a slot that was free before this simulated time."""
        is_overdue = self._overdue_at == self._num_placed
        return self._num_placed < self.num_trials and not is_overdue and bool(self._free) and self._free[0] < sim_time

    def _may_place(self, name: str) -> bool:
        """Return whether the next trial in order has started, and no trial can leave its slot before one is free."""
        if name not in self._running or not self._free:
            return False
        earliest = self._earliest()
        return earliest is None or earliest >= self._free[0]

    def _place(self, name: str) -> None:
        """Give a trial the slot that was free first."""
        running = self._running[name]
        running.start = (self._free.pop(0) if self._free else (self._earliest() or 0)) - self._rejoined.pop(name, 0)
        self._unplaced.remove(name)
        if running.has_ended:
            self._free_slot(name)

    def _free_slot(self, name: str) -> None:
        insort(self._free, self._running.pop(name).sim_time)
