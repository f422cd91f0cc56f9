"""Population based bandits as they are in Ray Tune, which needs scikit-learn for them (extra `pb2`)."""

import math
from typing import Any

import numpy as np
import pandas as pd
from ray.tune.schedulers.pb2 import PB2

from orchestrator.spec.axes import Axis
from orchestrator.sweep.schedulers.population import Cloning, Explored


class _Seen:
    """A trial as PB2 is to see it: its values on the scale on which they are searched."""

    def __init__(self, trial: Any, config: dict[str, Any]) -> None:
        self._name = str(trial)
        self.config = config

    def __str__(self) -> str:
        return self._name


class Pb2(Cloning, PB2):  # type: ignore[misc]  # mypy skips ray
    """Searches loguniform axes by the logarithm: Tune's own would hardly try a rate of the lower decades.

    Until a donor has reported twice with the same values there is no gain to learn from, and Tune's own would train a
    copy of the donor, values and all. Here the clone's are drawn from the ranges, as a population's first values are.
    """

    data: Any
    """A table of all reports: trial, time, values, reward."""

    def __init__(self, space: dict[str, Axis], **settings: Any) -> None:
        """`settings` are those of `Cloning`."""
        self._logs = {path for path, axis in space.items() if "log" in axis.kind}
        self._explored = Explored(space)
        bounds = {path: [self._scaled(path, end) for end in axis.probes()] for path, axis in space.items()}
        super().__init__(hyperparam_bounds=bounds, **settings)

    def _save_trial_state(self, state: Any, time: float, result: dict[str, Any], trial: Any) -> Any:
        return super()._save_trial_state(state, time, result, self._seen(trial))

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        known = len(self.data)
        found, operations = super()._get_new_config(self._seen(trial), self._seen(trial_to_clone))
        if len(self.data) == known:  # Tune's `_explore` adds a row for each point that it has chosen itself
            found = self._drawn(str(trial), str(trial_to_clone))
        values = {path: math.exp(value) if path in self._logs else float(value) for path, value in found.items()}
        return self._explored(values), operations

    def _drawn(self, clone: str, donor: str) -> dict[str, float]:
        """A point of the ranges, which is noted as those that Tune chooses: it is one of its round, and begins here."""
        found = {path: np.random.uniform(low, high) for path, (low, high) in self._hyperparam_bounds.items()}
        self.current[-1] = list(found.values())
        begun = self.data[self.data["Trial"] == donor].iloc[-1]
        row = {"Trial": clone, "Time": begun["Time"], **found, "Reward": begun["Reward"]}
        self.data = pd.concat([self.data, pd.DataFrame([row])], ignore_index=True)
        return found

    def _seen(self, trial: Any) -> _Seen:
        return _Seen(trial, {path: self._scaled(path, value) for path, value in trial.config.items()})

    def _scaled(self, path: str, value: float) -> float:
        return math.log(value) if path in self._logs else float(value)
