"""HyperBand, and HyperBand for BOHB, as they are in Ray Tune but for three faults of theirs (ray 2.60)."""

from typing import Any

from ray.tune.schedulers import HyperBandForBOHB, HyperBandScheduler, TrialScheduler

UNIT = "units"
"""Time in a report: multiples of the grace period, the resource of one in the papers."""


class HyperBand(HyperBandScheduler):  # type: ignore[misc]  # ray is untyped
    """A bracket is told of the end of its trials more than once.

    Tune marks a bracket as one that is being processed, and never takes the mark away: after its first rung a trial
    that fails, or ends early, leaves those that wait for it waiting for ever.
    """

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        action = super()._process_bracket(tune_controller, bracket)
        bracket.is_being_processed = False
        return str(action)


class Bohb(HyperBandForBOHB):  # type: ignore[misc]  # ray is untyped
    """Brackets of their own size, and all results for the searcher.

    Tune puts a new trial into a bracket whose trials have ended, where it would meet no rung any more; and the searcher
    never hears of a trial that is stopped as it reports, nor of one that runs to its end: the last rung was missing.
    """

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        """As in `HyperBand`."""
        action = super()._process_bracket(tune_controller, bracket)
        bracket.is_being_processed = False
        return str(action)

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
        if action == TrialScheduler.STOP:
            self._tell(tune_controller, trial, result, rung)
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """See Tune."""
        if result[UNIT] >= self._max_t_attr:
            self._tell(tune_controller, trial, result, self._max_t_attr)
        super().on_trial_complete(tune_controller, trial, result)

    def _tell(self, tune_controller: Any, trial: Any, result: dict[str, Any], budget: float) -> None:
        told = {**result, "hyperband_info": {"budget": budget}}
        tune_controller.search_alg.searcher.on_trial_result(trial.trial_id, told)
