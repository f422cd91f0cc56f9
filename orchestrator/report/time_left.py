"""Estimate how long a sweep will still take, as a range.

The estimate draws futures of the sweep. In each, every trial that has not ended makes steps until it is stopped at an
evaluation or has made all of them, and trials that have not begun take the slots that become free. How likely a stop is
follows from the scheduler's rungs and from the trials that have ended; how fast steps are made, from the steps made so
far. The range is that of nine in ten futures.
"""

import heapq
import math
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import stdev

from orchestrator.record import OPEN, TrialResult, TrialState
from orchestrator.report.budget_left import BudgetLeft
from orchestrator.report.stop_chances import StopChances, draw_survival
from orchestrator.spec import SweepSpec

_FUTURES = 40
"""Futures of a sweep of up to a hundred trials; of a larger one fewer, which differ less."""
_EVERY_S = 2.0
"""Shortest time between two estimates, in seconds. In between, the last one counts down."""
_SAMPLES = 256
"""Measurements of the pace that are kept. With more, every second one is dropped."""
_FEW = 12
"""Fewest samples in which a recent pace is measured, and most starts of trials that are looked back on."""
_PACE_ERROR = 0.25
"""Standard deviation of the logarithm of the future pace, relative to the measured one: at most, and as long
as it is not known."""
_LEAST_ERROR = 0.05
"""The same of a sweep whose pace has been even so far."""
_CLOSING_S = 4.0
"""Seconds by which the end of the sweep may be missed although all steps are foreseen."""


@dataclass(frozen=True)
class _Sample:
    """Steps made up to a moment."""

    at: float
    """Seconds on the clock."""
    steps: int
    """Steps of all trials since their first ones were seen."""
    running: int
    """Trials that made steps at that moment."""


class TimeLeft:
    """Watches the trials of a sweep, and estimates the time that is left."""

    def __init__(self, spec: SweepSpec, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            spec: the experiment.
            clock: returns seconds.
        """
        self._clock = clock
        self._stops = StopChances(spec)
        self._budget = BudgetLeft(spec.search.budget, clock)
        self._default_steps = spec.training.steps
        self._max_concurrent = spec.resources.max_concurrent
        self._num_searched = spec.search.total_trials
        self._repeats = spec.search.repeats
        self._logging_steps = spec.training.logging_steps
        self._eval_steps = spec.training.eval_steps
        self._samples: list[_Sample] = []
        self._starts: dict[str, float] = {}
        """Trials that have made no step yet, with the times at which they were seen first."""
        self._start_s: list[float] = []
        """Seconds from the begin of a trial until its first steps were seen, for each trial that has made some."""
        self._first_steps: dict[str, int] = {}
        """Steps that a trial had made when some were seen first."""
        self._spacing = 0.0
        self._slots = 1
        self._begun: set[str] = set()
        """Trials that have been seen."""
        self._late: set[str] = set()
        """Trials that were seen first when another one was half done."""
        self._estimate: tuple[float, tuple[float, float]] | None = None

    def update(self, trials: Sequence[TrialResult], num_trials: int) -> None:
        """Take in the present state.

        Args:
            trials: all trials that have begun, with the steps that they have made by now.
            num_trials: number of trials that the sweep will have.
        """
        now, running = self._clock(), [trial for trial in trials if trial.state == TrialState.RUNNING]
        self._slots = max(self._slots, len(running))
        self._time_starts(running, now)
        self._budget.update(trials)
        if any(trial.step * 2 > trial.total_steps for trial in trials if trial.total_steps):
            self._late |= {trial.trial_id for trial in trials} - self._begun
        self._begun |= {trial.trial_id for trial in trials}
        steps = sum(
            trial.step - self._first_steps.setdefault(trial.trial_id, trial.step) for trial in trials if trial.step
        )
        is_new = not self._samples or steps != self._samples[-1].steps
        if self._first_steps and is_new and (not self._samples or now >= self._samples[-1].at + self._spacing):
            self._samples.append(_Sample(now, steps, sum(trial.step > 0 for trial in running)))
            if len(self._samples) > _SAMPLES:
                self._samples = self._samples[::2]
                self._spacing = max(2 * self._spacing, 0.5)
        if self._estimate is None or now >= self._estimate[0] + _EVERY_S:
            before, found = self.range(), self._draw(trials, num_trials)
            if before is not None and found is not None:
                found = (before[0] + found[0]) / 2, (before[1] + found[1]) / 2
            self._estimate = None if found is None else (now, found)

    def _time_starts(self, running: Sequence[TrialResult], now: float) -> None:
        for trial in running:
            if not trial.step:
                self._starts.setdefault(trial.trial_id, now)
            elif (begun := self._starts.pop(trial.trial_id, None)) is not None and self._samples:
                self._start_s.append(now - begun)

    def range(self) -> tuple[float, float] | None:
        """Return the seconds that are left, from and to; None until the pace can be measured."""
        if self._estimate is None:
            return None
        at, (low, high) = self._estimate
        passed = self._clock() - at
        return max(low - passed, 0.0), max(high - passed, 0.0)

    def _draw(self, trials: Sequence[TrialResult], num_trials: int) -> tuple[float, float] | None:
        """Return the range over many futures; None if no pace has been measured."""
        if len(self._samples) < 3 or self._samples[-1].steps <= self._samples[0].steps:
            return None
        rng = random.Random(0)  # the same draws each time, so that the range moves only with the sweep
        known = [trial.total_steps for trial in trials if trial.total_steps]
        whole = max(known, default=0) or self._default_steps or 0
        if not whole:
            return None
        open_trials = [trial for trial in trials if trial.state in OPEN]
        begun = [(trial.step, trial.total_steps or whole, trial.trial_id in self._late) for trial in open_trials]
        waiting = max(num_trials - len(trials), 0)
        early = self._stops.seen([trial for trial in trials if trial.trial_id not in self._late], is_late=False)
        late = self._stops.seen([trial for trial in trials if trial.trial_id in self._late], is_late=True)
        num_starting = waiting + sum(not step for step, *_ in begun)
        futures, error = [], self._pace_error()
        for _ in range(max(8, min(_FUTURES, 100 * _FUTURES // (len(begun) + waiting + 1)))):
            rules = draw_survival(early, rng), draw_survival(late, rng)
            work = [
                self._beyond(step, rules[is_late].steps_left(step, total, rng), rng) for step, total, is_late in begun
            ]
            work += [self._beyond(0, rules[True].steps_left(0, whole, rng), rng) for _ in range(waiting)]
            work += self._repeated(len(trials), whole, rng)
            futures.append(self._duration(work, error, rng) + self._starting(num_starting, rng))
        futures.sort()
        tail = len(futures) // 20
        # Trials are also faster than any was so far, beside fewer others.
        low, high = max(futures[tail] * (1 - error) - _CLOSING_S, 0.0), futures[-1 - tail]
        if (spent_in := self._budget.seconds()) is not None:  # then each trial ends at its next evaluation
            low, high = min(low, spent_in * (1 - error)), min(high, spent_in * (1 + error) + self._to_evaluation())
        return low, high

    def _beyond(self, step: int, left: float, rng: random.Random) -> float:
        """Return the steps that are left of a trial, without those that it has made since they were counted last.

        Of a trial that has made none, the first ones belong to the time of its start.
        """
        if step:
            return max(left - rng.random() * self._logging_steps, 0.0)
        first = list(self._first_steps.values())
        return max(left - rng.choice(first), 0.0) if first else left

    def _to_evaluation(self) -> float:
        """Return the seconds between two evaluations of a trial."""
        return self._eval_steps / max(self._pace(self._samples, 0.0), 1e-9)

    def _repeated(self, num_begun: int, whole: int, rng: random.Random) -> list[float]:
        """Return the steps of the finalists that will run again and have not begun; there are two to four finalists."""
        planned = rng.randint(2, 4) * (self._repeats - 1)
        return [float(whole)] * max(planned - max(num_begun - self._num_searched, 0), 0)

    def _duration(self, work: Sequence[float], error: float, rng: random.Random) -> float:
        """Return the seconds in which the slots make these steps, one number for each trial.

        A trial alone is as fast as one beside others, or takes up their speed; each future has something in between.
        """
        sharing = rng.random()
        slots = min(self._slots, self._max_concurrent or self._slots)
        samples = self._recent() if rng.random() < 0.5 else self._samples
        pace = self._pace(samples, sharing) * rng.lognormvariate(0.0, error)
        waiting, virtual, seconds = list(reversed(work)), 0.0, 0.0
        ends: list[float] = []
        while waiting or ends:
            while waiting and len(ends) < slots:
                heapq.heappush(ends, virtual + waiting.pop())
            end = heapq.heappop(ends)
            seconds += (end - virtual) / (pace * (slots / (len(ends) + 1)) ** sharing)
            virtual = end
        return seconds + rng.random() * _CLOSING_S

    def _starting(self, number: int, rng: random.Random) -> float:
        """Return the seconds in which so many trials start, all slots together."""
        if not self._start_s:
            return 0.0
        return sum(rng.choice(self._start_s[-_FEW:]) for _ in range(number)) / self._slots

    def _pace(self, samples: Sequence[_Sample], sharing: float) -> float:
        """Return the steps per second of a trial when all slots are taken.

        Args:
            samples: the time over which it is measured.
            sharing: how much of the speed of an empty slot the others take up, from 0 to 1.
        """
        slot_seconds: float = sum(
            (after.at - before.at) * max(before.running, 1) * (self._slots / max(before.running, 1)) ** sharing
            for before, after in pairwise(samples)
        )
        steps = max(samples[-1].steps - samples[0].steps, 1)  # a trial that goes back to a checkpoint loses some
        return steps / max(slot_seconds, 1e-9)

    def _pace_error(self) -> float:
        """Return the standard deviation of the logarithm of the pace, between the quarters of the time so far."""
        apart = len(self._samples) // 4
        if apart < _FEW // 4:
            return _PACE_ERROR
        quarters = [self._samples[index * apart : (index + 1) * apart + 1] for index in range(4)]
        found = stdev(math.log(max(self._pace(quarter, 0.5), 1e-9)) for quarter in quarters)
        return min(max(found, _LEAST_ERROR), _PACE_ERROR)

    def _recent(self) -> list[_Sample]:
        """Return the samples of the second half of the time, or more if there are too few to measure a pace."""
        middle = (self._samples[0].at + self._samples[-1].at) / 2
        first = bisect_left([sample.at for sample in self._samples], middle)
        return self._samples[max(min(first, len(self._samples) - _FEW), 0) :]
