"""Resuming a sweep with more trials or another budget, and after its experiment file has changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RequestError
from orchestrator.record import (
    BudgetSpent,
    SearchEnded,
    SweepInfo,
    SweepPaths,
    SweepRecord,
    extend,
    read_sweep,
    write_info,
    write_record,
)
from orchestrator.record.extend import changed_since, extend_sweep, save_extension
from orchestrator.record.new_sweep import source_of
from orchestrator.spec import load_spec

RATES = {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}
RANKS = {"lora.rank": {"choice": [4, 8, 16, 32]}}
EXPERIMENT = """
base: {model: embedded}
data: {source: embedded, format: template, template: "{question} {answer}"}
training: {steps: 100, learning_rate: 1e-3}
search:
  num_trials: 4
  space: {lora.rank: {choice: [4, 8, 16, 32]}}
"""

Make = Callable[..., SweepRecord]


@pytest.fixture
def make(tmp_path: Path, make_sweep: Callable[..., Any]) -> Make:
    """Make a sweep's record on disk; arguments are fields of its search section."""

    def write(**search: Any) -> SweepRecord:
        return read_sweep(make_sweep(tmp_path / "s", {}, **{"space": RATES, "num_trials": 4, **search}).root)

    return write


def test_more_trials_and_a_larger_budget_are_recorded(make: Make) -> None:
    record = make(budget={"tokens": 100})
    write_record(record.paths.budget, BudgetSpent(limit="tokens", allowed=100, spent=120))
    extended = extend_sweep(record, 6, ["tokens=500", "gpu_hours=2"])
    assert read_sweep(record.paths.root) == record, "nothing is written before the sweep is driven"
    save_extension(extended)
    info = read_sweep(record.paths.root).info
    assert info == extended.info
    assert (info.num_trials, info.spec.search.budget.tokens, info.spec.search.budget.gpu_hours) == (6, 500, 2.0)
    assert [(change.field, change.before, change.after) for change in info.changes] == [
        ("search.num_trials", 4, 6),
        ("search.budget.tokens", 100, 500),
        ("search.budget.gpu_hours", None, 2.0),
    ]
    assert record.budget_spent() is None, "whether the new budget is spent is found out when the sweep continues"
    again = extend_sweep(read_sweep(record.paths.root), 8, [])
    assert [change.after for change in again.info.changes] == [6, 500, 2.0, 8]


def test_a_larger_budget_holds_if_the_driver_is_killed_once_it_is_recorded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make(budget={"tokens": 100})
    write_record(record.paths.budget, BudgetSpent(limit="tokens", allowed=100, spent=120))

    def write_and_die(paths: SweepPaths, info: SweepInfo) -> None:
        write_info(paths, info)
        raise KeyboardInterrupt

    extended = extend_sweep(record, None, ["tokens=500"])
    with monkeypatch.context() as patched:
        patched.setattr(extend, "write_info", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            save_extension(extended)
    save_extension(extend_sweep(read_sweep(record.paths.root), None, ["tokens=500"]))
    assert record.budget_spent() is None


def test_more_trials_lift_the_rule_that_has_ended_a_sweep(make: Make) -> None:
    record = make(num_trials=40, stop={"gain": "0.3%", "min_trials": 20})
    ended = SearchEnded(
        rule="gain", num_ended=20, leader="a", metric="eval/loss", best=1.0, share=0.003, expected_gain=0.001, tokens=9
    )
    write_record(record.paths.search_ended, ended)
    assert record.why_over() == ended
    extended = extend_sweep(record, 30, [])
    assert record.search_ended() is not None, "nothing is written before the sweep is driven"
    save_extension(extended)
    info = read_sweep(record.paths.root).info
    assert (info.num_trials, info.spec.search.stop.gain, info.spec.search.stop.min_trials) == (30, None, 20)
    assert [(change.field, change.before, change.after) for change in info.changes] == [
        ("search.num_trials", 40, 30),
        ("search.stop.gain", 0.003, None),
    ]
    assert record.why_over() is None
    write_record(record.paths.search_ended, ended)
    for num_trials in (None, 30):
        save_extension(extend_sweep(read_sweep(record.paths.root), num_trials, []))
        assert record.why_over() is None, "the driver that lifted the rule may have been killed before it removed this"
        write_record(record.paths.search_ended, ended)


def test_a_rule_that_has_not_ended_the_sweep_stays_in_force(make: Make) -> None:
    record = make(num_trials=40, stop={"unmoved": 8})
    with pytest.raises(RequestError, match="--trials 30: the sweep already has 40"):
        extend_sweep(record, 30, [])
    assert extend_sweep(record, 50, []).info.spec.search.stop.unmoved == 8


def test_a_resume_without_changes_writes_nothing(make: Make) -> None:
    record = make()
    written = record.paths.sweep.stat().st_mtime_ns
    assert extend_sweep(record, None, []) == record
    save_extension(record)
    assert record.paths.sweep.stat().st_mtime_ns == written


def test_a_grid_that_has_ended_itself_can_try_the_rest_of_its_points(make: Make) -> None:
    record = make(algorithm="grid", num_trials=None, space=RANKS, stop={"unmoved": 1, "min_trials": 2})
    ended = SearchEnded(rule="unmoved", num_ended=2, leader="a", metric="eval/loss", best=1.0, unmoved=1)
    write_record(record.paths.search_ended, ended)
    with pytest.raises(RequestError, match="--trials 6: the grid has 4 points; give that number"):
        extend_sweep(record, 6, [])
    save_extension(extend_sweep(record, 4, []))
    info = read_sweep(record.paths.root).info
    assert (info.num_trials, [change.field for change in info.changes]) == (4, ["search.stop.unmoved"])
    assert record.why_over() is None


@pytest.mark.parametrize(
    ("search", "num_trials", "budget", "message"),
    [
        ({}, 4, [], "--trials 4: the sweep already has 4; give the total number, not the difference"),
        ({"space": {}, "num_trials": None}, 6, [], "--trials: nothing is searched here"),
        (
            {"algorithm": "grid", "num_trials": None, "space": RANKS},
            6,
            [],
            "--trials: a grid tries each of its points once",
        ),
        ({"space": RANKS}, 6, [], "6 trials would repeat points, because the space has 4"),
        ({}, None, ["tokens"], "--budget tokens: must be LIMIT=V, where LIMIT is one of wall_clock_hours, gpu_hours"),
        ({}, None, ["token=5"], "--budget token=5: must be LIMIT=V"),
        ({}, None, ["tokens=-5"], "search.budget.tokens"),
    ],
)
def test_changes_that_are_not_possible_are_refused(
    make: Make, search: dict[str, Any], num_trials: int | None, budget: list[str], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        extend_sweep(make(**search), num_trials, budget)


@pytest.mark.parametrize("kind", ["hyperband", "pbt"])
def test_schedulers_whose_trials_begin_together_take_no_later_ones(make: Make, kind: str) -> None:
    record = make(algorithm="random")
    scheduler = {"scheduler": {"kind": kind}, "training": {"steps": 90, "eval_steps": 10}}
    spec = record.info.spec.model_validate(record.info.spec.model_dump(mode="json") | scheduler)
    record = SweepRecord(record.paths, record.info.model_copy(update={"spec": spec}))
    with pytest.raises(RequestError, match=f"--trials: scheduler {kind} compares trials that begin together"):
        extend_sweep(record, 6, [])


def test_a_changed_file_is_described_field_by_field(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(EXPERIMENT)
    overrides = ["training.steps=50", "data.source=./rows.jsonl"]
    monkeypatch.chdir(tmp_path)
    record = make()
    info = record.info.model_copy(update={"spec": load_spec(file, overrides), "source": source_of(file, overrides)})
    monkeypatch.chdir("/")
    assert changed_since(info) == [], "also from another working directory"
    extended = extend_sweep(SweepRecord(record.paths, info), None, ["tokens=9"])
    assert changed_since(extended.info) == [], "a change made by resume is not a change of the file"
    file.write_text(EXPERIMENT.replace("1e-3", "2e-3").replace("16, 32]", "16]").replace("num_trials: 4", "seed: 3"))
    assert changed_since(info) == [
        "training.learning_rate: 0.001 recorded, 0.002 in the file",
        "search.num_trials: 4 recorded, None in the file",
        "search.space.lora.rank.choice: [4, 8, 16, 32] recorded, [4, 8, 16] in the file",
        "search.seed: 0 recorded, 3 in the file",
    ]
    file.write_text("base: {modle: embedded}")
    (message,) = changed_since(info)
    assert message.startswith("it is no longer a valid experiment: ")
    file.unlink()
    assert changed_since(info) == []


def test_a_changed_metric_is_told_by_its_checksum(make: Make, tmp_path: Path) -> None:
    """The sweep continues with the recorded text, whatever becomes of the file."""
    own, file = tmp_path / "own.py", tmp_path / "x.yaml"
    own.write_text("def score(prompts, answers, references): return [1.0] * len(answers)\n")
    file.write_text(EXPERIMENT + "evaluation: {metrics: [own.py:score]}\n")
    spec = load_spec(file)
    info = make().info.model_copy(update={"source": source_of(file, []), "spec": spec})
    assert changed_since(info) == []
    own.write_text(own.read_text().replace("1.0", "0.5"))
    (message,) = changed_since(info)
    assert spec.evaluation.own[0].sha256[:12] in message
    assert load_spec(file).evaluation.own[0].sha256[:12] in message
    own.unlink()
    assert changed_since(info)[0].startswith("it is no longer a valid experiment: evaluation.metrics.0: 'own.py:score'")
