"""A scheduler that cannot have an effect is refused before a sweep."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.embedded import EXPERIMENT as DEMO
from orchestrator.errors import SpecError
from orchestrator.spec import load_spec, parse_spec
from orchestrator.spec.scheduler_effect import require_scheduler_effect

EXPERIMENTS = Path(__file__).parents[3] / "experiments"

Document = dict[str, Any]

SPACE = {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}
STEPS = {"steps": 100, "eval_steps": 20}
TOKENS = 80 * 4 * 512
"""Maximum tokens of a trial up to step 80, with 4 rows of 512 tokens in a step."""


def written(document: Document, scheduler: Document, training: Document = STEPS, **search: Any) -> Any:
    section = {"space": SPACE, **search}
    return parse_spec(document | {"training": training, "scheduler": scheduler, "search": section})


def refused(document: Document, scheduler: Document, training: Document = STEPS, **search: Any) -> str:
    with pytest.raises(SpecError) as caught:
        require_scheduler_effect(written(document, scheduler, training, **search))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_grace_period_after_the_last_evaluation_is_refused(document: Document, kind: str) -> None:
    message = refused(document, {"kind": kind, "grace_steps": 100})
    assert message == (
        f"scheduler.grace_steps: with 100, {kind} would have no effect: the last evaluation before a trial's end "
        "(100 steps) is at step 80; give at most 80"
    )
    require_scheduler_effect(written(document, {"kind": kind, "grace_steps": 80}))
    message = refused(document, {"kind": kind, "grace_tokens": TOKENS + 1})
    assert f"scheduler.grace_tokens: with {TOKENS + 1}, {kind} would have no effect" in message
    assert f"is at step 80, of at most {TOKENS} tokens; give at most {TOKENS}" in message
    require_scheduler_effect(written(document, {"kind": kind, "grace_tokens": TOKENS}))


@pytest.mark.parametrize("kind", ["asha", "median", "hyperband", "bohb"])
def test_trials_with_a_single_evaluation_are_refused(document: Document, kind: str) -> None:
    scheduler = {"kind": kind} | ({"max_steps": 300} if kind in ("hyperband", "bohb") else {})
    algorithm = "bohb" if kind == "bohb" else "random"
    for eval_steps in (100, 70 * 2):
        training = {"steps": 100, "eval_steps": eval_steps}
        if kind in ("hyperband", "bohb"):
            scheduler["max_steps"] = 4 * eval_steps
        message = refused(document, scheduler, training, algorithm=algorithm)
        assert f"scheduler.kind: {kind} would have no effect: with training.eval_steps {eval_steps} no trial" in message
        assert "before its last step (100); give training.eval_steps below 100" in message
    require_scheduler_effect(written(document, {"kind": "none"}, training))


def test_the_longest_trial_counts_if_steps_are_searched(document: Document) -> None:
    scheduler = {"kind": "asha", "grace_steps": 100}
    space = {"training.steps": {"choice": [60, 400]}}
    require_scheduler_effect(written(document, scheduler, space=space))
    assert "(90 steps) is at step 80" in refused(document, scheduler, space={"training.steps": {"randint": [60, 91]}})


@pytest.mark.parametrize(
    ("training", "axes", "tied"),
    [
        ({"steps": 50, "eval_steps": 20}, {"training.steps": [50, 150], "training.batch_size": [4, 8]}, {}),
        ({"epochs": 1.0, "eval_steps": 20}, {"training.epochs": [1.0, 2.0], "training.batch_size": [8, 4]}, {}),
        (
            {"steps": 50, "eval_steps": 20},
            {"lora.rank": [8, 16], "training.seed": [1, 8]},
            {"training.steps": "lora.rank * training.seed"},
        ),
    ],
)
def test_the_longest_trial_is_found_among_all_combinations(
    document: Document, training: Document, axes: dict[str, list[Any]], tied: dict[str, str]
) -> None:
    """Changing one axis at a time would find only shorter ones: 120, 100 and 64 steps."""
    space = {path: {"choice": values} for path, values in axes.items()}
    tokens = 120 * 8 * 512 if "training.steps" in axes else None
    scheduler = {"kind": "asha"} | ({"grace_tokens": tokens} if tokens else {"grace_steps": 120})
    require_scheduler_effect(written(document, scheduler, training, space=space, tied=tied), 300)
    spec = written(document, {"kind": "asha", "grace_steps": 160}, training, space=space, tied=tied)
    with pytest.raises(SpecError, match="grace_steps: with 160, asha would have no effect"):
        require_scheduler_effect(spec, 300)


def test_too_many_lengths_to_try_are_accepted(document: Document) -> None:
    fields = ("training.steps", "training.batch_size", "training.accumulation")
    space = {field: {"choice": list(range(1, 12))} for field in fields}
    require_scheduler_effect(written(document, {"kind": "asha", "grace_steps": 400}, space=space))


@pytest.mark.parametrize(
    ("training", "axis", "tied", "rows", "most"),
    [
        ({"epochs": 1.0, "eval_steps": 10}, [4, 11], {}, 100, 9 * 10 * 512),
        (
            {"steps": 100, "eval_steps": 50},
            [6, 13],
            {"training.steps": "800 // training.batch_size"},
            None,
            7 * 100 * 512,
        ),
    ],
)
def test_in_tokens_the_longest_trial_may_be_between_the_ends(
    document: Document, training: Document, axis: list[int], tied: dict[str, str], rows: int | None, most: int
) -> None:
    space = {"training.batch_size": {"randint": axis}}
    require_scheduler_effect(
        written(document, {"kind": "asha", "grace_tokens": most}, training, space=space, tied=tied), rows
    )
    spec = written(document, {"kind": "asha", "grace_tokens": most + 1}, training, space=space, tied=tied)
    with pytest.raises(SpecError, match=f"give at most {most}"):
        require_scheduler_effect(spec, rows)


def test_a_combination_that_the_loader_has_not_tried_is_reported_too(document: Document) -> None:
    training = {"schedule": "warmup_stable_decay", "warmup": 0, "decay_steps": 50, "steps": 100, "eval_steps": 2}
    axis = {"choice": [100, 1, *range(60, 90)]}
    space, tied = (
        {"lora.rank": axis, "training.accumulation": axis},
        {"training.steps": "lora.rank * training.accumulation"},
    )
    with pytest.raises(SpecError, match=r"lora.rank 1 with training.accumulation 1 gives .* decay_steps \(50\) exceed"):
        require_scheduler_effect(written(document, {"kind": "asha"}, training, space=space, tied=tied))


@pytest.mark.parametrize("rows", [None, 380, 400, 401])
def test_with_epochs_the_number_of_rows_decides(document: Document, rows: int | None) -> None:
    spec = written(document, {"kind": "asha", "grace_steps": 100}, {"epochs": 1.0, "eval_steps": 20})
    if rows in (380, 400):  # 95 and 100 steps
        with pytest.raises(SpecError, match=r"grace_steps: with 100, asha would .* is at step 80; give at most 80"):
            require_scheduler_effect(spec, rows)
    else:
        require_scheduler_effect(spec, rows)


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"steps": 7, "batch_size": 4}, 7),
        ({"epochs": 1.0, "batch_size": 4}, 26),
        ({"batch_size": 4, "accumulation": 3}, 9),
        ({"epochs": 0.5, "batch_size": 4, "accumulation": 3}, 5),
    ],
)
def test_steps_of_a_number_of_rows(document: Document, training: Document, steps: int) -> None:
    assert parse_spec(document | {"training": training}).training.steps_of(101) == steps


def test_the_median_rule_needs_other_trials(document: Document) -> None:
    message = refused(document, {"kind": "median", "min_trials": 10})
    assert message.startswith(
        "scheduler.min_trials: with 10 the median rule can stop no trial: each of 10 trials has only 9 others to"
    )
    assert message.endswith("give at most 9")
    require_scheduler_effect(written(document, {"kind": "median", "min_trials": 9}))


@pytest.mark.parametrize(
    "scheduler", [{"kind": "median", "min_trials": 9}, {"kind": "asha", "grace_steps": 200}], ids=str
)
def test_a_single_trial_may_have_any_scheduler(document: Document, scheduler: Document) -> None:
    require_scheduler_effect(written(document, scheduler, num_trials=1))


def test_hyperband_needs_enough_trials_for_a_bracket_with_a_rung(document: Document) -> None:
    scheduler = {
        "kind": "hyperband",
        "reduction_factor": 2,
    }  # 5 units: brackets of 3, 3 and 4, the first without a rung
    message = refused(document, scheduler, num_trials=5)
    assert message.startswith(
        "search.num_trials: with 5 trials, hyperband would stop none: its brackets are filled one after"
    )
    assert "give 6 or more" in message
    require_scheduler_effect(written(document, scheduler, num_trials=6))
    require_scheduler_effect(written(document, {"kind": "bohb", "reduction_factor": 2}, num_trials=4, algorithm="bohb"))


def test_rungs_after_the_end_are_refused(document: Document) -> None:
    scheduler = {"kind": "hyperband", "grace_steps": 20, "max_steps": 1000, "reduction_factor": 10}
    assert refused(document, scheduler) == (
        "scheduler.max_steps: with 1000, hyperband would have no effect: its first rung is at 100 steps, and the last "
        "evaluation before a trial's end is at 80; give 200, which has a rung at 20"
    )
    require_scheduler_effect(written(document, scheduler | {"max_steps": 200}, num_trials=20))


def test_remedies_fit_the_searcher(document: Document) -> None:
    band = {"kind": "hyperband", "reduction_factor": 2}
    grid = {"training.learning_rate": {"grid": [1e-5, 1e-4, 1e-3]}}
    message = refused(document, band, algorithm="grid", num_trials=None, space=grid)
    assert message.startswith("search.space: with 3 trials, hyperband")
    assert "give a grid of 6 or more, or" in message
    bohb = {"kind": "bohb", "max_steps": 180}  # the first rung keeps 3 of 9, the second is after the end
    message = refused(document, bohb, {"steps": 50, "eval_steps": 20}, algorithm="bohb", num_trials=3)
    assert "those with the most rungs first; give" in message
    assert message.endswith("or scheduler.kind asha with another search.algorithm")
    message = refused(document, {"kind": "asha"}, {"steps": 1, "eval_steps": 5})
    assert message.endswith("before its last step (1); give more training.steps, or scheduler.kind none")


@pytest.mark.parametrize("kind", ["pbt", "pb2"])
def test_an_interval_after_the_last_evaluation_is_refused(document: Document, kind: str) -> None:
    message = refused(document, {"kind": kind, "interval_tokens": TOKENS + 1})
    assert f"scheduler.interval_tokens: with {TOKENS + 1}, {kind} would have no effect" in message
    require_scheduler_effect(written(document, {"kind": kind, "interval_tokens": TOKENS}))
    assert f"scheduler.interval_steps: with 100, {kind} would have no effect" in refused(
        document, {"kind": kind, "interval_steps": 100}
    )


def test_check_refuses_it_but_a_single_trial_may_be_run() -> None:
    checked = CliRunner().invoke(
        app,
        [
            "check",
            str(DEMO),
            "--set",
            "training.eval_steps=50",
            "--set",
            "training.steps=50",
            "--set",
            "scheduler={kind: asha}",
        ],
    )
    assert isinstance(checked.exception, SpecError)
    assert "with training.eval_steps 50 no trial is evaluated before its last step (50)" in str(checked.exception)
    assert "`orchestrator trial` has no scheduler and would run" in str(checked.exception)
    assert load_spec(DEMO, ["training.steps=50"])


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_scheduler_of_every_shipped_experiment_has_an_effect(file: Path) -> None:
    require_scheduler_effect(load_spec(file))
