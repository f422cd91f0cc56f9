"""What a sweep takes from earlier ones: which trials fit, and why others do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RequestError
from orchestrator.priors.evidence import evidence_from, with_evidence
from orchestrator.rate_prior import with_prior
from orchestrator.record import SweepRecord, TrialState, read_sweep, write_record
from orchestrator.record.models import PriorSweep, PriorTrial
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.spec.search import RATE
from orchestrator.sweep.search.coordinates import Coordinate
from orchestrator.sweep.search.factory import make_searcher
from orchestrator.sweep.search.prior_evidence import comparable, first_points, not_replaced

Document = dict[str, Any]
Earlier = Callable[..., SweepRecord]
SPACE = {RATE: {"loguniform": [1e-5, 1e-2]}, "lora.rank": {"choice": [8, 16, 64]}}


@pytest.fixture
def earlier(make_sweep: Callable[..., Any], tmp_path: Path) -> Earlier:
    """Return a function that writes a sweep of trials, each with a rate, a rank, a loss and a state."""

    def make(trials: list[tuple[float, int, float, TrialState]], name: str = "first", **lora: Any) -> SweepRecord:
        found = make_sweep(tmp_path / name, {f"t{i}": (each[3], each[2]) for i, each in enumerate(trials)})
        record = read_sweep(found.root)
        for i, (rate, rank, _, _) in enumerate(trials):
            trial = next(each for each in record.trials() if each.trial_id == f"t{i}")
            config = trial.config.model_copy(
                update={
                    "training": trial.config.training.model_copy(update={"learning_rate": rate}),
                    "lora": trial.config.lora.model_copy(update={"rank": rank} | lora),
                }
            )
            write_record(record.paths.trial(trial.trial_id).result, trial.model_copy(update={"config": config}))
        return read_sweep(found.root)

    return make


def searching(document: Document, **search: Any) -> SweepSpec:
    return parse_spec(document | {"search": {"space": SPACE, "num_trials": 12} | search})


WHOLE, STOPPED = TrialState.COMPLETE, TrialState.STOPPED
TRIALS = [(1e-3, 16, 1.0, WHOLE), (3e-3, 64, 1.5, WHOLE), (2e-3, 8, 0.9, STOPPED), (2e-3, 32, 0.8, WHOLE)]


def test_finished_trials_on_the_axes_are_taken_and_others_named(earlier: Earlier, document: Document) -> None:
    (found,) = evidence_from(searching(document), [earlier(TRIALS)])
    assert [(each.point, each.value) for each in found.trials] == [
        ({RATE: 1e-3, "lora.rank": 16}, 1.0),
        ({RATE: 3e-3, "lora.rank": 64}, 1.5),
    ]
    assert sorted(found.left_out) == [
        "1 trial: lora.rank 32 is not a value of this search",
        "1 trial: stopped, without its last result",
    ]
    _, said = with_evidence(searching(document), [found])
    assert said[0].startswith("warm start: 2 finished trials of sweep first (")
    assert "left out 1 trial: lora.rank 32 is not a value of this search" in said[0]


def test_a_trial_without_a_finite_result_is_left_out(earlier: Earlier, document: Document) -> None:
    (found,) = evidence_from(searching(document), [earlier([*TRIALS[:1], (2e-3, 8, float("-inf"), WHOLE)])])
    assert [each.value for each in found.trials] == [1.0]
    assert found.left_out == ["1 trial: no result"]


def test_trials_with_another_scale_of_the_update_are_left_out(earlier: Earlier, document: Document) -> None:
    with pytest.raises(RequestError, match=r"none of its trials fits: 2 trials: lora\.rslora is True there and False"):
        evidence_from(searching(document), [earlier(TRIALS[:2], rslora=True)])


def test_trials_with_another_alpha_are_left_out_and_a_tied_alpha_is_resolved(
    earlier: Earlier, document: Document
) -> None:
    """The update is scaled by alpha / rank, so the best rate goes with its inverse."""
    other = earlier(TRIALS[:2], alpha=64.0)
    here = parse_spec(document).lora.alpha
    with pytest.raises(
        RequestError, match=rf"none of its trials fits: 2 trials: lora\.alpha is 64\.0 there and {here}"
    ):
        evidence_from(searching(document), [other])
    (found,) = evidence_from(searching(document, tied={"lora.alpha": "4 * lora.rank"}), [other])
    assert [each.point["lora.rank"] for each in found.trials] == [16]
    assert found.left_out == ["1 trial: lora.alpha is 64.0 there and 256.0 here"]


def test_a_configuration_has_16_as_16_0_where_the_axis_lists_it(earlier: Earlier, document: Document) -> None:
    """The default space lists whole numbers of alpha, and a configuration holds it as a real number."""
    space = SPACE | {
        "lora.alpha": {"choice": [16, 32, 64]},
        "lora.dropout": {"choice": [0, 0.1], "when": {"lora.alpha": [64]}},
    }
    spec = searching(document, space=space)
    (found,) = evidence_from(spec, [earlier(TRIALS[:1], alpha=64.0, dropout=0.0)])
    (trial,) = found.trials
    assert repr(trial.point) == repr({RATE: 1e-3, "lora.rank": 16, "lora.alpha": 64, "lora.dropout": 0})
    again = [PriorSweep.model_validate_json(found.model_dump_json())]
    spec, _ = with_prior(with_evidence(spec, again)[0])
    assert make_searcher(spec, 1, again).suggest("a") == trial.point


def test_a_range_of_whole_numbers_takes_16_0_as_16(earlier: Earlier, document: Document) -> None:
    spec = searching(document, space=SPACE | {"lora.alpha": {"randint": [8, 65]}})
    (found,) = evidence_from(spec, [earlier(TRIALS[:1], alpha=64.0)])
    assert repr(found.trials[0].point["lora.alpha"]) == "64"


def test_a_sweep_that_is_given_twice_counts_once(earlier: Earlier, document: Document) -> None:
    other = earlier(TRIALS)
    assert len(evidence_from(searching(document), [other, read_sweep(other.paths.root)])) == 1


@pytest.mark.parametrize("algorithm", ["random", "hyperopt"])
def test_algorithms_that_cannot_use_it_refuse_it(earlier: Earlier, document: Document, algorithm: str) -> None:
    with pytest.raises(RequestError, match=f"--warm-from: algorithm {algorithm} does not learn") as found:
        evidence_from(searching(document, algorithm=algorithm), [earlier(TRIALS)])
    assert "search.algorithm: auto or optuna" in str(found.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": {"source": "x.jsonl", "format": "alpaca"}}, "its rows are template with loss on all, and these are"),
        ({"base": {"model": "BASE", "family": "qwen3"}}, "its base is of family llama, and this one of qwen3"),
        ({"base": {"model": "BASE", "family": "llama"}}, "more than a factor of 1.5"),
        ({"base": {"model": "BASE", "family": None}}, "the family of its base or of this one is not known"),
        ({"search": {"metric": "eval/token_accuracy"}}, "its metric is eval/loss, and this one eval/token_accuracy"),
    ],
)
def test_sweeps_that_say_nothing_are_refused(
    earlier: Earlier, document: Document, tmp_path: Path, change: Document, reason: str
) -> None:
    other = earlier(TRIALS)
    if "base" in change:
        config = {"hidden_size": 4096} | ({"model_type": change["base"]["family"]} if change["base"]["family"] else {})
        (tmp_path / "config.json").write_text(json.dumps(config))
        change = {"base": {"model": str(tmp_path)}}
    spec = searching(document | {k: v for k, v in change.items() if k != "search"}, **change.get("search", {}))
    with pytest.raises(RequestError, match=reason) as found:
        evidence_from(spec, [other])
    assert "first" in str(found.value)
    assert "Leave this sweep out" in str(found.value)


def a_sweep(*values: float, name: str = "first") -> PriorSweep:
    trials = [
        PriorTrial(trial_id=f"t{i}", point={RATE: 1e-3 * (i + 1), "lora.rank": 16}, value=value)
        for i, value in enumerate(values)
    ]
    return PriorSweep(name=name, created="2026-01-01T00:00:00+00:00", base="embedded", trials=trials)


def test_results_on_other_data_are_put_at_the_level_of_the_own_ones() -> None:
    """Their best equals the own best, and their differences count half."""
    found = comparable([a_sweep(4.0, 1.0), a_sweep(100.0)], "min", 0.5)
    assert [value for _, value in found] == pytest.approx([1.0, 0.5, 0.5])
    by_accuracy = comparable([a_sweep(0.4, 0.8)], "max", -0.6)
    assert [value for _, value in by_accuracy] == pytest.approx([-0.4, -0.6])
    assert [value for _, value in comparable([a_sweep(4.0, 1.0)], "min", float("inf"))] == pytest.approx([2.0, 1.0])


def test_the_search_begins_at_the_best_earlier_trial_and_then_follows_the_model(document: Document) -> None:
    earlier = [a_sweep(3.0, 1.0, 2.0, 2.5)]
    spec, _ = with_evidence(searching(document), earlier)
    spec, _ = with_prior(spec)
    searcher = make_searcher(spec, 1, earlier)
    assert searcher.suggest("a") == {RATE: 2e-3, "lora.rank": 16}
    searcher.on_trial_complete("a", {"eval/loss": 7.0, "training_iteration": 1})
    searcher.suggest("b")
    assert searcher.searcher.why_chosen("b").startswith("Gaussian process on 1 results and 3 of earlier sweeps expects")


def test_each_own_result_takes_the_place_of_the_nearest_earlier_one(document: Document) -> None:
    spec = searching(document)
    coordinates = {path: Coordinate.of(axis) for path, axis in spec.search.space.items()}
    earlier = [
        ({RATE: rate, "lora.rank": rank}, float(i)) for i, (rate, rank) in enumerate([(1e-5, 8), (1e-3, 8), (1e-3, 64)])
    ]
    own = {RATE: 2e-3, "lora.rank": 64}
    assert [value for _, value in not_replaced(earlier, [own], coordinates)] == [0.0, 1.0]
    assert [value for _, value in not_replaced(earlier, [own, own], coordinates)] == [0.0]
    assert not_replaced(earlier, [own] * 5, coordinates) == []


def test_own_results_outweigh_earlier_ones(document: Document) -> None:
    """The earlier sweep says that low rates are best; here high ones are. If all earlier trials stayed beside the own
    ones, the twelfth trial would still have a rate below 1e-3."""
    rates = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    trials = [
        PriorTrial(trial_id=f"t{i}", point={RATE: rate, "lora.rank": 16}, value=1 + 0.1 * i)
        for i, rate in enumerate(rates)
    ]
    earlier = [a_sweep(1.0).model_copy(update={"trials": trials})]
    spec, _ = with_prior(with_evidence(searching(document), earlier)[0])
    searcher = make_searcher(spec, 1, earlier)
    points = []
    for i in range(12):
        points.append(searcher.suggest(f"t{i}"))
        loss = 2.0 - 0.2 * float(points[-1][RATE] / 1e-5) ** 0.2
        searcher.on_trial_complete(f"t{i}", {"eval/loss": loss, "training_iteration": 1})
    assert points[0][RATE] == 1e-5
    assert max(point[RATE] for point in points) > 1e-3


def test_optuna_tries_the_best_earlier_points_first(document: Document) -> None:
    earlier = [a_sweep(3.0, 1.0, 2.0), a_sweep(8.0, 5.0, 6.0, name="second")]
    assert [point[RATE] for point in first_points(earlier, "min")] == [2e-3, 3e-3, 1e-3]
    searcher = make_searcher(searching(document, algorithm="optuna"), 4, earlier)
    assert [searcher.suggest(f"t{i}")[RATE] for i in range(3)] == pytest.approx([2e-3, 3e-3, 1e-3])


def test_what_was_taken_is_in_the_record_and_no_trial(earlier: Earlier) -> None:
    """A resume needs no other folder."""
    record = earlier(TRIALS)
    info = record.info.model_copy(update={"prior_sweeps": [a_sweep(1.0, 2.0)]})
    write_record(record.paths.sweep, info)
    again = read_sweep(record.paths.root)
    assert again.info.prior_sweeps == [a_sweep(1.0, 2.0)]
    assert len(again.trials()) == len(TRIALS)
