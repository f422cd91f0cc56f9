"""The order in which a scheduler hears of trials that run side by side.

Reports of trials that train at the same pace arrive in an order that depends on the machine. A rule such as ASHA's,
which compares a report with those before it, would decide otherwise in every run. So a report waits until all trials
beside it have come as far, and those of one moment are heard in the order of the trials. Their workers train on.

This is a conservative discrete-event simulation (Chandy and Misra, IEEE TSE 5(5), 1979). Its clock counts optimizer
steps since the sweep began, as if all trials made them at one pace and each took its slot when an earlier one left it.
"""

from bisect import insort
from dataclasses import dataclass, field

MIN_PATIENCE_S = 60.0
"""A report waits at least this long for trials that are behind."""

PATIENCE = 0.25
"""It waits longer where that is less than this share of the time for which its trial has run."""

PACE = 2.0
"""It does not wait for trials that take this many times as long for a step: they would hold it up at every report."""


@dataclass
class _Running:
    """A trial that has a slot."""

    began: int | None = None
    """Moment at which it took its slot; None while that is not known."""
    step: int = 0
    """Step of its last report."""
    reported_s: float | None = None
    """When that report came, if it waits."""
    ran_s: float = 0.0
    """Seconds for which the trial had run by then, on its worker."""
    has_ended: bool = False
    """Whether its slot is free again, from a moment that is not known yet."""
    is_missed: bool = False
    """Whether a report has waited for it in vain since its own last report."""

    @property
    def moment(self) -> int:
        """Moment of its last report. The trial's first moment is known."""
        assert self.began is not None
        return self.began + self.step

    def holds_up(self, other: "_Running") -> bool:
        """Whether another's report waits for this trial: it is behind, and likely to catch up."""
        is_slow = self.ran_s * other.step > PACE * other.ran_s * self.step
        return not self.is_missed and not is_slow and self.moment < other.moment


@dataclass
class Moments:
    """The trials of a sweep, and their reports that wait. Times are seconds of one clock."""

    at_once: int
    """Slots that there are."""
    total: int
    """Trials of the sweep. If fewer come, reports wait in vain for the others once."""
    _index: dict[str, int] = field(default_factory=dict)
    """Trials as they were added, which is the order in which they begin."""
    _to_place: list[str] = field(default_factory=list)
    """Those whose first moment is not known yet, in that order."""
    _running: dict[str, _Running] = field(default_factory=dict)
    _missed_after: int | None = None
    """The number that had been placed when a report had waited in vain for the next one."""
    _free: list[int] = field(init=False)
    """Moments from which slots are free, ascending."""

    def __post_init__(self) -> None:
        self._free = [0] * self.at_once

    def add(self, trial: str) -> None:
        """Take in a trial, behind those that were added before."""
        if trial not in self._index:
            self._index[trial] = len(self._index)
            self._to_place.append(trial)

    def report(self, trial: str, step: int, now_s: float, ran_s: float = 0.0) -> None:
        """A trial has made so many steps in so many seconds; its report waits until `next` names the trial."""
        running = self._running.setdefault(trial, _Running())
        running.step, running.reported_s, running.ran_s, running.is_missed = step, now_s, ran_s, False

    def is_running(self, trial: str) -> bool:
        """Whether a trial has reported, and has not ended."""
        return trial in self._running

    def heard(self, trial: str) -> None:
        """A report waits no more, and the trial goes on."""
        if trial in self._running:
            self._running[trial].reported_s = None

    def end(self, trial: str, step: int | None = None) -> None:
        """A trial gives its slot back after this step, or that of its last report; nothing if it has done so before."""
        if trial not in self._running and trial not in self._to_place:
            return
        running = self._running.setdefault(trial, _Running())
        running.reported_s, running.has_ended = None, True
        running.step = running.step if step is None else step
        if running.began is not None:
            self._free_slot(trial)

    def resume(self, at_once: int, total: int) -> None:
        """Go on with other numbers of slots and trials. Reports that waited are forgotten: they come again."""
        more, self.at_once, self.total = at_once - self.at_once, at_once, total
        for _ in range(more):
            insort(self._free, self._earliest() or 0)
        del self._free[max(0, len(self._free) + min(0, more)) :]
        for running in self._running.values():
            running.reported_s = None

    def next(self, now_s: float) -> str | None:
        """The trial whose report the scheduler is to hear now; None while all of them wait for others."""
        while self._to_place and self._may_place(self._to_place[0]):
            self._place(self._to_place[0])
        for name in [name for name in self._to_place if name in self._running]:
            if self._is_out_of_patience(self._running[name], now_s):
                self._place(name)  # those before it do not come
        placed = {name: each for name, each in self._running.items() if each.began is not None}
        waiting = [name for name, each in placed.items() if each.reported_s is not None]
        if not waiting:
            return None
        name = min(waiting, key=lambda each: (placed[each].moment, self._index[each]))
        running = placed[name]
        behind = [each for each in placed.values() if each.holds_up(running)]
        if behind or self._awaits_newcomer(running.moment):
            if not self._is_out_of_patience(running, now_s):
                return None
            for each in behind:
                each.is_missed = True
            self._missed_after = self._num_placed
        return name

    @property
    def _num_placed(self) -> int:
        return len(self._index) - len(self._to_place)

    @staticmethod
    def _is_out_of_patience(running: _Running, now_s: float) -> bool:
        since = running.reported_s
        return since is not None and now_s >= since + max(MIN_PATIENCE_S, PATIENCE * running.ran_s)

    def _earliest(self) -> int | None:
        """The moment after which the next report or end of a trial can come."""
        return min((each.moment for each in self._running.values() if each.began is not None), default=None)

    def _awaits_newcomer(self, moment: int) -> bool:
        """Whether a trial has begun, or is to begin, in a slot that was free before this moment."""
        is_missed = self._missed_after == self._num_placed
        return self._num_placed < self.total and not is_missed and bool(self._free) and self._free[0] < moment

    def _may_place(self, name: str) -> bool:
        """Whether a trial, the next in order, has begun, and none can leave its slot before the first one is free."""
        if name not in self._running or not self._free:
            return False
        earliest = self._earliest()
        return earliest is None or earliest >= self._free[0]

    def _place(self, name: str) -> None:
        """Give a trial the slot that came free first."""
        running = self._running[name]
        running.began = self._free.pop(0) if self._free else (self._earliest() or 0)
        self._to_place.remove(name)
        if running.has_ended:
            self._free_slot(name)

    def _free_slot(self, name: str) -> None:
        insort(self._free, self._running.pop(name).moment)
