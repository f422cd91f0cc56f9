"""Ray Tune's population based training, with separate random state and values from the search space."""

from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from orchestrator.spec.axes import Axis
from orchestrator.sweep.rng import IsolatedRng


@dataclass(frozen=True)
class Clone:
    """A trial that continues from the state of another, with other values."""

    trial_id: str
    donor: str
    step: int
    """Step of the donor's checkpoint."""
    values: dict[str, Any]


class NearestValues:
    """Moves the values that a population has reached to the nearest ones of the space. It is pickled with the sweep."""

    def __init__(self, space: dict[str, Axis]) -> None:
        self._space = space

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        return {
            path: value if self._space[path].listed() is not None else self._space[path].nearest(value)
            for path, value in config.items()
        }


class CloneRecorder:
    """Mixin for a Tune scheduler that clones trials: it records the clones and isolates the random state."""

    def __init__(self, rng: IsolatedRng, **settings: Any) -> None:
        """
        Args:
            rng: the random state that the scheduler draws from.
            settings: arguments of the Tune scheduler.
        """
        super().__init__(**settings)
        self._rng = rng
        self._clones: list[Clone] = []

    def take_clones(self) -> list[Clone]:
        """Return the clones since the last call."""
        taken, self._clones = self._clones, []
        return taken

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide about a trial that reports, with random numbers of this scheduler."""
        with self._rng.in_use():
            return str(super().on_trial_result(tune_controller, trial, result))  # type: ignore[misc]

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        super()._exploit(tune_controller, trial, trial_to_clone)  # type: ignore[misc]
        step = self._trial_state[trial_to_clone].last_result["step"]  # type: ignore[attr-defined]
        self._clones.append(Clone(trial.trial_id, trial_to_clone.trial_id, step, dict(trial.config)))


class Pbt(CloneRecorder, PopulationBasedTraining):  # type: ignore[misc]  # mypy skips ray
    """Population based training that records its clones."""


def mutations(space: dict[str, Axis]) -> dict[str, Any]:
    """Return field -> what PBT may change it to.

    A listed value moves to its neighbor. A value of a range is multiplied, or drawn again from the range.
    """
    return {path: _mutation(axis) for path, axis in space.items()}


def _mutation(axis: Axis) -> Any:
    if (listed := axis.listed()) is not None:
        return listed
    low, high = axis.probes()
    return tune.loguniform(low, high) if "log" in axis.kind else tune.uniform(low, high)
