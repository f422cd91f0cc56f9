"""HyperBand, and HyperBand for BOHB, as they are in Ray Tune but for faults of theirs (ray 2.60)."""

from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import HyperBandForBOHB, HyperBandScheduler, TrialScheduler

UNIT = "units"
"""Time in a report: multiples of the grace period, the resource of one in the papers."""


class HyperBand(HyperBandScheduler):  # type: ignore[misc]  # mypy skips ray
    """See `_process` and `_rungs`."""

    def __init__(self, **settings: Any) -> None:
        """`settings` are those of Tune's."""
        super().__init__(**settings)
        self._get_r0 = _rungs(self._max_t_attr, self._eta)

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        return _process(bracket, lambda: super(HyperBand, self)._process_bracket(tune_controller, bracket))


class Bohb(HyperBandForBOHB):  # type: ignore[misc]  # mypy skips ray
    """Brackets of their own size, and all results for the searcher.

    Tune puts a new trial into a bracket whose trials have ended, where it would meet no rung any more; and the searcher
    never hears of a trial that is stopped as it reports, nor of one that runs to its end: the last rung was missing.
    See `_process` and `_rungs` too.
    """

    def __init__(self, **settings: Any) -> None:
        """`settings` are those of Tune's."""
        super().__init__(**settings)
        self._get_r0 = _rungs(self._max_t_attr, self._eta)

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        return _process(bracket, lambda: super(Bohb, self)._process_bracket(tune_controller, bracket))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """See Tune."""
        bracket = self._state["bracket"]
        if bracket is not None and (len(bracket._all_trials) >= bracket._n0 or bracket._n < bracket._n0):
            self._state["bracket"] = None
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See Tune."""
        bracket, _ = self._trial_info[trial]
        rung = bracket._cumul_r
        action = str(super().on_trial_result(tune_controller, trial, result))
        if action == TrialScheduler.PAUSE and len(bracket._all_trials) == bracket._n0 and _is_due(bracket):
            # To Tune one whose checkpoint is being made does not wait yet: trials that report together would each
            # wait for the others, until nothing trains at all.
            action = self._process_bracket(tune_controller, bracket)
            if action != TrialScheduler.PAUSE:
                tune_controller.search_alg.searcher.on_unpause(trial.trial_id)
        if action == TrialScheduler.STOP:
            self._tell(tune_controller, trial, result, rung)
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """See Tune."""
        if result[UNIT] >= self._max_t_attr:
            self._tell(tune_controller, trial, result, self._max_t_attr)
        super().on_trial_complete(tune_controller, trial, result)

    def next_rung(self, trial: Any) -> float:
        """The rung that a trial comes to next, in units of the grace period; past the last one the end of a trial."""
        bracket, _ = self._trial_info[trial]
        return float(min(bracket._cumul_r, self._max_t_attr))

    def _tell(self, tune_controller: Any, trial: Any, result: dict[str, Any], budget: float) -> None:
        told = {**result, "hyperband_info": {"budget": budget}}
        tune_controller.search_alg.searcher.on_trial_result(trial.trial_id, told)


def _process(bracket: Any, once: Callable[[], Any]) -> str:
    """Halve a bracket as often as its trials allow.

    Tune does it once: trials that are past the next rung already, where time is tokens, would wait for ever. And it
    marks a bracket as one that is being processed, and never takes the mark away: after its first rung a trial that
    fails, or ends early, would leave those that wait for it waiting for ever.

    Returns:
        What becomes of the trial that reports: once it is stopped, it stays so.
    """
    action = str(once())
    while bracket._live_trials and _is_due(bracket):
        again = str(once())
        action = action if action == TrialScheduler.STOP else again
    bracket.is_being_processed = False
    return action


def _is_due(bracket: Any) -> bool:
    """Whether a bracket has a rung before it that all its trials have come to."""
    return bool(bracket._halves and bracket.cur_iter_done())


def _rungs(longest: int, factor: int) -> Callable[[int], int]:
    """The first rung of a bracket by its number of halvings. Tune rounds reals down: 49 * 7**-2 would be 0."""
    return lambda halvings: longest // factor**halvings
