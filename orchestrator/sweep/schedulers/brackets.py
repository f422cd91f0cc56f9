"""Ray Tune's HyperBand, and its HyperBand for BOHB, with corrections of their faults (ray 2.60)."""

from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import HyperBandForBOHB, HyperBandScheduler, TrialScheduler

UNIT = "units"
"""Key of a report: its time in multiples of the grace period, which is the unit of resource in the papers."""


class HyperBand(HyperBandScheduler):  # type: ignore[misc]  # mypy skips ray
    """HyperBand with corrected halving (`_halve_fully`) and corrected first rungs (`_first_rungs`)."""

    def __init__(self, **settings: Any) -> None:
        """Take the arguments of Tune's `HyperBandScheduler`."""
        super().__init__(**settings)
        self._get_r0 = _first_rungs(self._max_t_attr, self._eta)

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        return _halve_fully(bracket, lambda: super(HyperBand, self)._process_bracket(tune_controller, bracket))


class Bohb(HyperBandForBOHB):  # type: ignore[misc]  # mypy skips ray
    """HyperBand for BOHB with full brackets, which reports all results to the searcher.

    Tune adds a new trial to a bracket whose trials have ended, where it would meet no rung any more. And it does not
    report to the searcher a trial that is stopped at its own report, nor one that runs to its end, so that the last
    rung is missing. The corrections of `_halve_fully` and `_first_rungs` apply too.
    """

    def __init__(self, **settings: Any) -> None:
        """Take the arguments of Tune's `HyperBandForBOHB`."""
        super().__init__(**settings)
        self._get_r0 = _first_rungs(self._max_t_attr, self._eta)

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        return _halve_fully(bracket, lambda: super(Bohb, self)._process_bracket(tune_controller, bracket))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Start a new bracket if the current one has had all its trials or has halved them already."""
        bracket = self._state["bracket"]
        if bracket is not None and (len(bracket._all_trials) >= bracket._n0 or bracket._n < bracket._n0):
            self._state["bracket"] = None
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide about a trial that reports, and report it to the searcher if it is stopped."""
        bracket, _ = self._trial_info[trial]
        rung = bracket._cumul_r
        action = str(super().on_trial_result(tune_controller, trial, result))
        if action == TrialScheduler.PAUSE and len(bracket._all_trials) == bracket._n0 and _is_due(bracket):
            # Tune does not count a trial as paused while its checkpoint is written: trials that report together would
            # each wait for the others, until nothing trains at all.
            action = self._process_bracket(tune_controller, bracket)
            if action != TrialScheduler.PAUSE:
                tune_controller.search_alg.searcher.on_unpause(trial.trial_id)
        if action == TrialScheduler.STOP:
            self._report_to_searcher(tune_controller, trial, result, rung)
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Report a trial that has run to its end to the searcher, at the last rung."""
        if result[UNIT] >= self._max_t_attr:
            self._report_to_searcher(tune_controller, trial, result, self._max_t_attr)
        super().on_trial_complete(tune_controller, trial, result)

    def next_rung(self, trial: Any) -> float:
        """Return the next rung of a trial, in units of the grace period; past the last rung, the end of the trial."""
        bracket, _ = self._trial_info[trial]
        return float(min(bracket._cumul_r, self._max_t_attr))

    def _report_to_searcher(self, tune_controller: Any, trial: Any, result: dict[str, Any], rung: float) -> None:
        report = {**result, "hyperband_info": {"budget": rung}}
        tune_controller.search_alg.searcher.on_trial_result(trial.trial_id, report)


def _halve_fully(bracket: Any, halve_once: Callable[[], Any]) -> str:
    """Halve a bracket as often as its trials allow.

    Tune halves it once. Trials that are already past the next rung, as may happen where time is tokens, would wait
    forever. Tune also marks a bracket as being processed and never removes the mark: a trial that fails or ends early
    after the first rung would leave the trials that wait for it waiting forever.

    Returns:
        The action for the trial that reports: STOP once any halving has stopped it.
    """
    action = str(halve_once())
    while bracket._live_trials and _is_due(bracket):
        next_action = str(halve_once())
        action = action if action == TrialScheduler.STOP else next_action
    bracket.is_being_processed = False
    return action


def _is_due(bracket: Any) -> bool:
    """Return whether a bracket has a next rung and all its trials have reached it."""
    return bool(bracket._halves and bracket.cur_iter_done())


def _first_rungs(longest: int, factor: int) -> Callable[[int], int]:
    """Return a function: number of halvings -> first rung of the bracket. Tune rounds 49 * 7**-2 down to 0."""
    return lambda halvings: longest // factor**halvings
