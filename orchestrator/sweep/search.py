"""The experiment's space and algorithm in Ray Tune's terms."""

from typing import Any

from ray import tune
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from orchestrator.spec.search import Axis, SearchSection


def tune_space(search: SearchSection) -> dict[str, Any]:
    """Dotted field -> Tune domain. Tied values are not in it: they are resolved after the searcher."""
    return {path: _domain(axis, search.algorithm == "grid") for path, axis in search.space.items()}


def make_searcher(search: SearchSection, at_once: int) -> Searcher | SearchAlgorithm:
    """The algorithm, seeded, with so many trials at once."""
    if search.algorithm == "optuna":
        return Limiter(OptunaSearch(metric=search.metric, mode=search.resolved_mode, seed=search.seed), at_once)
    return Variants(random_state=search.seed, max_concurrent=at_once)


class Limiter(ConcurrencyLimiter):  # type: ignore[misc]  # ray is untyped
    """Keeps to its own limit after a resume, not to that of the workers of then."""

    def set_state(self, state: dict[str, Any]) -> None:
        """See Tune."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})


class Variants(BasicVariantGenerator):  # type: ignore[misc]  # ray is untyped
    """As `Limiter`."""

    def set_state(self, state: dict[str, Any]) -> None:
        """See Tune."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})


def _domain(axis: Axis, every_value: bool) -> Any:
    if axis.is_discrete:
        return tune.grid_search(axis.values) if every_value else tune.choice(axis.values)
    low, high = axis.values
    match axis.kind:
        case "loguniform":
            return tune.loguniform(low, high)
        case "randint":
            return tune.randint(low, high)
        case _:
            return tune.uniform(low, high)
