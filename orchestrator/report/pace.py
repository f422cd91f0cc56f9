"""Measure how many tokens a sweep trains on per second."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from orchestrator.record import TrialResult

_WINDOW_S = 20.0
"""Seconds over which the pace is averaged."""


class TokenPace:
    """The tokens per second of all trials together, over the last seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: returns seconds.
        """
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()
        """Times, and the tokens of all trials then."""

    def update(self, trials: Sequence[TrialResult]) -> None:
        """Take in the tokens of all trials. Tokens taken over from another trial do not count."""
        now = self._clock()
        self._seen.append((now, sum(trial.tokens - trial.adopted_tokens for trial in trials)))
        while len(self._seen) > 2 and self._seen[1][0] < now - _WINDOW_S:
            self._seen.popleft()

    def per_second(self) -> float | None:
        """Return tokens per second; None until two different times are known."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return None
        (since, before), (until, after) = self._seen[0], self._seen[-1]
        return max(after - before, 0) / (until - since)
