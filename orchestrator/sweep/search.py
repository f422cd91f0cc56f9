"""The experiment's space and algorithm in Ray Tune's terms."""

from typing import Any

from ray import tune
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from orchestrator.spec.search import Axis, SearchSection


def tune_space(search: SearchSection) -> dict[str, Any]:
    """Dotted field -> Tune domain. Tied values are not in it: they are resolved after the searcher."""
    return {path: _domain(axis, search.algorithm == "grid") for path, axis in search.space.items()}


def make_searcher(search: SearchSection, max_concurrent: int | None) -> Searcher | SearchAlgorithm:
    """The algorithm, seeded. Optuna's concurrency is limited by Tune, that of the others by themselves."""
    if search.algorithm == "optuna":
        return OptunaSearch(metric=search.metric, mode=search.resolved_mode, seed=search.seed)
    return BasicVariantGenerator(random_state=search.seed, max_concurrent=max_concurrent or 0)


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
