"""Estimate how long a sweep will still take, as a range.

The estimate draws futures of the sweep. In each, every trial that has not ended makes steps until it is stopped at an
evaluation or has made all of them, and trials that have not begun take the slots that become free. How likely a stop is
follows from the scheduler's rungs and from the trials that have ended; how fast steps are made, from the steps made so
far. The range is that of nine in ten futures.
"""

import heapq
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.record import OPEN, TrialResult, TrialState
from orchestrator.report.stop_chances import StopChances, draw_survival
from orchestrator.spec import SweepSpec

_FUTURES = 40
_PRICE_S = 2.0
"""Shortest time between two estimates, in seconds. In between, the last one counts down."""
_SAMPLES = 256
"""Measurements of the pace that are kept. With more, every second one is dropped."""
_PACE_ERROR = 0.15
"""Standard deviation of the logarithm of the future pace, relative to the measured one."""
_CLOSING_S = 4.0
"""Longest time from the last step to the end of the sweep that no step foretells, in seconds."""


@dataclass(frozen=True)
class _Sample:
    """Steps made up to a moment."""

    at: float
    """Seconds on the clock."""
    steps: int
    """Steps of all trials."""
    running: int
    """Trials that trained at that moment."""


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
        self._default_steps = spec.training.steps
        self._max_concurrent = spec.resources.max_concurrent
        self._repeats = spec.search.repeats
        self._samples: list[_Sample] = []
        self._spacing = 0.0
        self._slots = 1
        self._estimate: tuple[float, tuple[float, float]] | None = None

    def update(self, trials: Sequence[TrialResult], num_trials: int) -> None:
        """Take in the present state.

        Args:
            trials: all trials that have begun, with the steps that they have made by now.
            num_trials: number of trials that the sweep will have.
        """
        now, running = self._clock(), sum(trial.state == TrialState.RUNNING for trial in trials)
        self._slots = max(self._slots, running)
        steps = sum(trial.step for trial in trials)
        if steps and (not self._samples or now >= self._samples[-1].at + self._spacing):
            self._samples.append(_Sample(now, steps, running))
            if len(self._samples) > _SAMPLES:
                self._samples = self._samples[::2]
                self._spacing = max(2 * self._spacing, 0.5)
        if self._estimate is None or now >= self._estimate[0] + _PRICE_S:
            found = self._draw(trials, num_trials)
            self._estimate = None if found is None else (now, found)

    def range(self) -> tuple[float, float] | None:
        """Return the seconds that are left, from and to; None until the pace can be measured."""
        if self._estimate is None:
            return None
        at, (low, high) = self._estimate
        passed = self._clock() - at
        return max(low - passed, 0.0), max(high - passed, 0.0)

    def _draw(self, trials: Sequence[TrialResult], num_trials: int) -> tuple[float, float] | None:
        """Return the range over many futures; None if no pace has been measured."""
        if len(self._samples) < 2 or self._samples[-1].steps <= self._samples[0].steps:
            return None
        rng = random.Random(0)  # the same draws each time, so that the range moves only with the sweep
        known = [trial.total_steps for trial in trials if trial.total_steps]
        whole = max(known, default=0) or self._default_steps or 0
        if not whole:
            return None
        open_trials = [trial for trial in trials if trial.state in OPEN]
        begun = [(trial.step, trial.total_steps or whole) for trial in open_trials]
        waiting = max(num_trials - len(trials), 0)
        seen = self._stops.seen(trials)
        futures = []
        for _ in range(_FUTURES):
            survival = draw_survival(seen, rng)
            work = [survival.steps_left(step, total, rng) for step, total in begun]
            work += [survival.steps_left(0, whole, rng) for _ in range(waiting)]
            work += self._repeated(num_trials, whole, rng)
            futures.append(self._duration(work, rng))
        futures.sort()
        tail = len(futures) // 20
        return futures[tail], futures[-1 - tail]

    def _repeated(self, num_trials: int, whole: int, rng: random.Random) -> list[int]:
        """Return the steps of the finalists that will run again, if they have not begun: two to four of them."""
        if self._repeats < 2:
            return []
        return [whole] * (rng.randint(2, 4) * (self._repeats - 1))

    def _duration(self, work: list[int], rng: random.Random) -> float:
        """Return the seconds in which the slots make these steps, one number for each trial.

        A trial alone is as fast as one beside others, or takes up their speed; each future has something in between.
        """
        sharing = rng.random()
        slots = min(self._slots, self._max_concurrent or self._slots)
        pace = self._pace(sharing, rng.random() < 0.5) * rng.lognormvariate(0.0, _PACE_ERROR)
        waiting, virtual, seconds = list(reversed(work)), 0.0, 0.0
        ends: list[float] = []
        while waiting or ends:
            while waiting and len(ends) < slots:
                heapq.heappush(ends, virtual + waiting.pop())
            end = heapq.heappop(ends)
            seconds += (end - virtual) / (pace * (slots / (len(ends) + 1)) ** sharing)
            virtual = end
        return seconds + rng.random() * _CLOSING_S

    def _pace(self, sharing: float, is_recent: bool) -> float:
        """Return the steps per second of a trial when all slots are taken.

        Args:
            sharing: how much of the speed of an empty slot the others take up, from 0 to 1.
            is_recent: measure the second half of the time only.
        """
        samples = self._samples
        if is_recent and len(samples) > 3:
            middle = (samples[0].at + samples[-1].at) / 2
            samples = samples[min(bisect_left([each.at for each in samples], middle), len(samples) - 2) :]
            if samples[-1].steps <= samples[0].steps:
                samples = self._samples
        slot_seconds: float = sum(
            (after.at - before.at) * max(before.running, 1) * (self._slots / max(before.running, 1)) ** sharing
            for before, after in pairwise(samples)
        )
        return (samples[-1].steps - samples[0].steps) / max(slot_seconds, 1e-9)
