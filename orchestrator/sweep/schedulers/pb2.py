"""Ray Tune's population based bandits, which need scikit-learn (extra `pb2`)."""

import math
from typing import Any

import numpy as np
import pandas as pd
from ray.tune.schedulers.pb2 import PB2

from orchestrator.spec.axes import Axis
from orchestrator.sweep.rng import IsolatedRng
from orchestrator.sweep.schedulers.population import CloneRecorder, NearestValues


class _ScaledTrial:
    """A trial as PB2 sees it: values of log axes are logarithms."""

    def __init__(self, trial: Any, config: dict[str, Any]) -> None:
        self._name = str(trial)
        self.config = config

    def __str__(self) -> str:
        return self._name


class Pb2(CloneRecorder, PB2):  # type: ignore[misc]  # mypy skips ray
    """Population based bandits that search log axes by the logarithm, and draw where they cannot learn yet.

    Tune's PB2 searches all axes linearly, and would hardly try a learning rate of the lower decades.

    Until a donor has reported twice with the same values, there is no gain to learn from. Tune's PB2 would then train a
    copy of the donor with the same values. This class draws the values of the clone from the ranges, as the first
    values of a population are drawn.
    """

    data: Any
    """A table of all reports, with columns for trial, time, values and reward."""

    def __init__(self, rng: IsolatedRng, space: dict[str, Axis], **settings: Any) -> None:
        """
        Args:
            rng: the random state that the scheduler draws from.
            space: the axes of the experiment.
            settings: other arguments of Tune's `PB2`.
        """
        self._log_axes = {path for path, axis in space.items() if "log" in axis.kind}
        self._nearest_values = NearestValues(space)
        bounds = {path: [self._scale(path, end) for end in axis.probes()] for path, axis in space.items()}
        super().__init__(rng, hyperparam_bounds=bounds, **settings)

    def _save_trial_state(self, state: Any, time: float, result: dict[str, Any], trial: Any) -> Any:
        return super()._save_trial_state(state, time, result, self._scaled(trial))

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        num_rows = len(self.data)
        found, operations = super()._get_new_config(self._scaled(trial), self._scaled(trial_to_clone))
        if len(self.data) == num_rows:  # Tune's `_explore` adds a row for each point that it has chosen itself
            found = self._draw(str(trial), str(trial_to_clone))
        values = {path: math.exp(value) if path in self._log_axes else float(value) for path, value in found.items()}
        return self._nearest_values(values), operations

    def _draw(self, clone: str, donor: str) -> dict[str, float]:
        """Draw a point from the ranges, and add the same row and entry of `current` as Tune does for its own points."""
        found = {path: np.random.uniform(low, high) for path, (low, high) in self._hyperparam_bounds.items()}
        self.current[-1] = list(found.values())
        donor_row = self.data[self.data["Trial"] == donor].iloc[-1]
        row = {"Trial": clone, "Time": donor_row["Time"], **found, "Reward": donor_row["Reward"]}
        self.data = pd.concat([self.data, pd.DataFrame([row])], ignore_index=True)
        return found

    def _scaled(self, trial: Any) -> _ScaledTrial:
        return _ScaledTrial(trial, {path: self._scale(path, value) for path, value in trial.config.items()})

    def _scale(self, path: str, value: float) -> float:
        return math.log(value) if path in self._log_axes else float(value)
