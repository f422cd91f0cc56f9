"""Wrong search spaces, and settings that cannot work, are refused with the field and the reason."""

from collections.abc import Callable

import pytest

from tests.unit.wrong_calls.calls import Wrong, overridden, trial

SEARCHES = [
    overridden("unknown kind of axis", ["search.space.lora.rank={chioce: [1]}"], "search.space.lora.rank", "chioce"),
    overridden("bare list as axis", ["search.space.lora.rank=[8, 16]"], "search.space.lora.rank", "{choice: [...]}"),
    overridden("axis without values", ["search.space.lora.rank={choice: []}"], "search.space.lora.rank", "at least 1"),
    overridden(
        "low above high", ["search.space.lora.dropout={uniform: [0.3, 0.1]}"], "lora.dropout", "(low=0.3, high=0.1)"
    ),
    overridden("low as high", ["search.space.lora.rank={randint: [8, 8]}"], "lora.rank", "low < high"),
    overridden(
        "logarithm of zero",
        ["search.space.training.learning_rate={loguniform: [0, 1e-3]}"],
        "search.space.training.learning_rate",
        "low > 0",
    ),
    overridden(
        "axis over no field", ["search.space.lora.rnk={choice: [8]}"], "there is no field lora.rnk", "rank, alpha"
    ),
    overridden("axis over no section", ["search.space.loar.rank={choice: [8]}"], "loar.rank", "base, lora or training"),
    overridden("axis over held-out rows", ["search.space.data.seed={choice: [1, 2]}"], "data.seed cannot vary"),
    overridden(
        "axis value out of bounds", ["search.space.lora.rank={choice: [8, 0]}"], "lora.rank", "the value 0 gives"
    ),
    overridden(
        "tied to no field", ["search.tied.lora.alpha=2 * lora.rnk"], "search.tied.lora.alpha", "no field lora.rnk"
    ),
    overridden("tied to a call", ["search.tied.lora.alpha=__import__('os')"], "search.tied.lora.alpha", "cannot use"),
    overridden("tied to no arithmetic", ["search.tied.lora.alpha=2 *"], "search.tied.lora.alpha", "is not arithmetic"),
    overridden(
        "tied and searched", ["search={space: {lora.rank: {choice: [1]}}, tied: {lora.rank: 1 + 1}}"], "both searched"
    ),
    overridden(
        "grid with a range", ["search={algorithm: grid, space: {lora.dropout: {uniform: [0, 0.1]}}}"], "lora.dropout"
    ),
    overridden("grid axis without grid", ["search.space.lora.rank={grid: [8]}"], "lora.rank is a grid axis", "is auto"),
    overridden("number of grid trials", ["search={algorithm: grid, num_trials: 3}"], "search: num_trials"),
    overridden("no such algorithm", ["search.algorithm=bayes"], "search.algorithm", "'optuna'", "'bayes'"),
]

MISUSES = [
    overridden(
        "held out is the training source",
        ["data.held_out={source: embedded}"],
        "held_out.source is the training source",
    ),
    overridden("part of no source", ["data.held_out={share: 0.1, max_rows: 5}"], "data.held_out", "none is given"),
    overridden("configuration of a file", ["data.config=main"], "data", "config belongs to a hub data set"),
    overridden(
        "warmup without an end", ["training.steps=20", "training.warmup=500"], "warmup (500 steps) must end before"
    ),
    overridden("tie to itself", ["search.tied.lora.alpha=2 * lora.alpha"], "reads lora.alpha, which is tied itself"),
    overridden(
        "tie to a later tie",
        ["search.tied={lora.alpha: 2 * lora.rank, lora.rank: 8 * training.batch_size}"],
        "reads lora.rank, which is tied itself",
    ),
    trial("more GPUs than there are", ["resources.gpus_per_trial=1"], "gpus_per_trial=1", "has 0 GPUs"),
]


@pytest.mark.parametrize("wrong", [*SEARCHES, *MISUSES], ids=lambda wrong: wrong.name.replace(" ", "-"))
def test_a_wrong_call_is_refused(wrong: Wrong, assert_refused: Callable[[Wrong], None]) -> None:
    assert_refused(wrong)
