"""Population based training as it is in Ray Tune, with random numbers of its own, within the ranges of the space."""

from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from orchestrator.spec import SweepSpec
from orchestrator.spec.axes import Axis
from orchestrator.sweep.rng import OwnRng


@dataclass(frozen=True)
class Clone:
    """A trial that goes on from the state of another, with other values."""

    trial_id: str
    donor: str
    step: int
    """Of the donor's checkpoint."""
    values: dict[str, Any]


class Explored:
    """Values that a population has come to, made values of the space again. Pickled with the sweep."""

    def __init__(self, space: dict[str, Axis]) -> None:
        self._space = space

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        return {
            path: value if self._space[path].listed() is not None else self._space[path].nearest(value)
            for path, value in config.items()
        }


class Cloning:
    """Tells of clones; goes before a scheduler of Tune's that makes them."""

    def __init__(self, draws: OwnRng, **settings: Any) -> None:
        """`settings` are those of the scheduler."""
        super().__init__(**settings)
        self._draws = draws
        self._clones: list[Clone] = []

    def take_clones(self) -> list[Clone]:
        """Those since the last call."""
        taken, self._clones = self._clones, []
        return taken

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See Tune."""
        with self._draws.in_use():
            return str(super().on_trial_result(tune_controller, trial, result))  # type: ignore[misc]

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        super()._exploit(tune_controller, trial, trial_to_clone)  # type: ignore[misc]
        step = self._trial_state[trial_to_clone].last_result["step"]  # type: ignore[attr-defined]
        self._clones.append(Clone(trial.trial_id, trial_to_clone.trial_id, step, dict(trial.config)))


class Pbt(Cloning, PopulationBasedTraining):  # type: ignore[misc]  # mypy skips ray
    """See Tune."""


def mutations(spec: SweepSpec) -> dict[str, Any]:
    """Field -> what PBT changes it to: its neighbour among listed values, else a multiple, or a draw from the range."""
    return {path: _mutation(axis) for path, axis in spec.search.space.items()}


def _mutation(axis: Axis) -> Any:
    if (listed := axis.listed()) is not None:
        return listed
    low, high = axis.probes()
    return tune.loguniform(low, high) if "log" in axis.kind else tune.uniform(low, high)
