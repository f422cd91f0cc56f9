"""Audits: which trials they finish, what they compare, and how sure they are."""

import io
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from simulated import begin_record
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import RequestError, SweepError
from orchestrator.record import (
    BestPoint,
    MetricPoint,
    SearchEnded,
    SweepPaths,
    SweepRecord,
    TrialResult,
    TrialState,
    read_sweep,
    write_record,
)
from orchestrator.report.audit import say_audit
from orchestrator.spec import parse_spec
from orchestrator.spec.search import RATE
from orchestrator.sweep import run
from orchestrator.sweep.audit import CONFIDENCE, audit_paths, begin_audit, find, num_bounds, stopped_trials

STEPS, TOKENS = 40, 10
RATES = {"winner": 1e-3, "a": 2e-3, "b": 3e-3, "c": 4e-3, "poor": 5e-3}
Make = Callable[..., SweepRecord]


def write_trial(record: SweepRecord, name: str, rate: float, state: str, curve: list[float], **fields: Any) -> None:
    """Write a trial that has evaluated every 10 steps."""
    paths, step = record.paths.trial(name), 10 * len(curve)
    config = record.info.spec.trial_config({RATE: rate})
    best = BestPoint(value=min(curve), step=step, values={"eval/loss": min(curve)}, adapter="adapters/step-10")
    result = TrialResult(
        trial_id=name, state=TrialState(state), config=config, metric="eval/loss", mode="min", best=best, step=step,
        total_steps=STEPS, tokens=TOKENS * step, seconds=0.5 * step, gpu_seconds=0.25 * step, **fields,
    )  # fmt: skip
    write_record(paths.config, config)
    write_record(paths.result, result)
    lines = [
        MetricPoint(step=10 * i, tokens=100 * i, time_s=i, values={"eval/loss": loss})
        for i, loss in enumerate(curve, 1)
    ]
    paths.metrics.write_text("".join(line.model_dump_json() + "\n" for line in lines))


@pytest.fixture
def make(tmp_path: Path, document: dict[str, Any]) -> Make:
    """Make a sweep of a winner, three trials that the rule stopped, and one that a spent budget stopped."""

    def write(num_trials: int = 5, **sections: Any) -> SweepRecord:
        search = {"space": {RATE: {"loguniform": [1e-5, 1e-1]}}, "num_trials": num_trials, "repeats": 3}
        spec = parse_spec(
            document
            | {"search": search, "training": {"steps": STEPS, "eval_steps": 10}, "scheduler": {"kind": "forecast"}}
            | sections
        )
        paths = SweepPaths(tmp_path / "sweep")
        begin_record(paths, spec)
        paths.data.mkdir()
        record = read_sweep(paths.root)
        write_trial(record, "winner", RATES["winner"], "COMPLETE", [2.0, 1.5, 1.2, 1.0])
        for name, curve in {"a": [3.0], "b": [3.0, 2.0], "c": [4.0]}.items():
            write_trial(record, name, RATES[name], "STOPPED", curve, stopped="forecast: too slow", extra_steps=2)
        write_trial(record, "poor", RATES["poor"], "STOPPED", [9.0], stopped="the budget is spent: 9 of 9 tokens")
        return record

    return write


def test_the_sample_is_of_trials_that_the_rule_has_stopped_and_runs_to_its_end(make: Make) -> None:
    record = make()
    before = {path: path.read_bytes() for path in record.paths.root.rglob("*") if path.is_file()}
    audit = begin_audit(record, None, 0)
    spec = audit.info.spec
    assert sorted(point[RATE] for point in spec.search.first) == [2e-3, 3e-3, 4e-3]
    assert (spec.scheduler.kind, spec.search.repeats, spec.search.total_trials) == ("none", 1, 3)
    assert not spec.tracking.tensorboard
    again = [spec.trial_config(point) for point in spec.search.first]
    assert {repr(config) for config in again} == {repr(trial.config) for trial in stopped_trials(record)}
    assert audit.paths.data.resolve() == record.paths.data.resolve()
    assert {path: path.read_bytes() for path in before} == before
    assert begin_audit(record, None, 0) == audit, "the same command finds the audit that it has begun"


def test_each_seed_has_a_sample_and_a_folder_of_its_own(make: Make) -> None:
    record = make()
    points = {seed: begin_audit(record, 1, seed).info.spec.search.first[0][RATE] for seed in range(9)}
    assert set(points.values()) == {2e-3, 3e-3, 4e-3}
    assert audit_paths(record, 1, 3).root.is_dir()


def test_an_audit_of_other_trials_is_replaced(make: Make) -> None:
    record = make()
    first = begin_audit(record, 3, 0)
    write_trial(record, "c", 7e-3, "STOPPED", [4.0], stopped="forecast: too slow")
    second = begin_audit(record, 3, 0)
    assert second.paths == first.paths
    assert 7e-3 in [point[RATE] for point in second.info.spec.search.first]


@pytest.mark.parametrize(
    ("change", "number", "message"),
    [
        ({"num_trials": 6}, None, "the sweep has not ended, and its best trial may change"),
        ({"scheduler": {"kind": "none"}}, None, "scheduler none has stopped no trial"),
        ({}, 4, "--trials 4: the scheduler has stopped 3; give at most that number"),
    ],
)
def test_what_cannot_be_audited_is_refused(
    change: dict[str, Any], number: int | None, message: str, make: Make
) -> None:
    with pytest.raises(RequestError, match=message):
        begin_audit(make(**change), number, 0)


def test_a_trial_that_was_lost_with_a_driver_is_no_end_of_the_sweep(make: Make) -> None:
    """Five of six trials have ended, and another was replaced after a driver was killed."""
    record = make(num_trials=6)
    write_trial(record, "lost", 6e-3, "CANCELLED", [9.0])
    with pytest.raises(RequestError, match="the sweep has not ended"):
        begin_audit(record, None, 0)


def test_a_sweep_that_ended_itself_can_be_audited(make: Make) -> None:
    record = make(num_trials=40)
    ended = SearchEnded(rule="unmoved", num_ended=5, leader="winner", metric="eval/loss", best=1.0, unmoved=4)
    write_record(record.paths.search_ended, ended)
    assert begin_audit(record, 2, 0).info.num_trials == 2


def test_an_audit_says_who_would_have_won_and_what_stopping_saved(make: Make) -> None:
    record = make()
    audit = begin_audit(record, 3, 0)
    write_trial(audit, "again-a", RATES["a"], "COMPLETE", [3.0, 2.0, 1.5, 0.8])
    write_trial(audit, "again-b", RATES["b"], "COMPLETE", [3.0, 2.1, 1.5, 1.3])
    write_trial(audit, "again-c", RATES["c"], "FAILED", [4.0], failure="diverged")
    found = find(record, audit, 0)
    outcomes = {trial.trial_id: (trial.audit_id, trial.value, trial.would_have_won) for trial in found.trials}
    assert outcomes == {
        "a": ("again-a", 0.8, True), "b": ("again-b", 1.3, False), "c": ("again-c", None, False),
    }  # fmt: skip
    assert {trial.trial_id: round(trial.difference, 6) for trial in found.trials} == {"a": 0.0, "b": 0.1, "c": 0.0}
    assert (found.leader, found.best, found.num_stopped, found.num_won) == ("winner", 1.0, 3, 1)
    assert found.interval == (1, 1), "all stopped trials were audited"
    assert found.regret == pytest.approx(0.2)
    # Of 40 steps a and c made 10, b made 20, and each 2 more before it heard of its stop.
    assert found.saving.tokens == TOKENS * (28 + 28 + 18)
    assert found.saving.gpu_seconds == pytest.approx(0.25 * (28 + 28 + 18))
    spent = TOKENS * (40 + 12 + 22 + 12 + 10)
    assert found.saving.share_of_tokens == pytest.approx(740 / (740 + spent))
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (document["num_won"], document["interval"], document["choice"]) == (1, [1, 1], "random")
    file = io.StringIO()
    say_audit(Console(file=file, width=200), found)
    said = file.getvalue()
    assert "a: stopped at step 10 at 3; ends at eval/loss 0.8: would have won" in said
    assert "b: stopped at step 20 at 2; ends at eval/loss 1.3 (until the stop within 0.1): would not have won" in said
    assert "c: stopped at step 10 at 4; it would have failed" in said
    assert "1 of 3 stopped trials would have won" in said
    assert "the largest missed gain is 0.2 eval/loss, 20.00% of it" in said
    assert "these are all trials that forecast has stopped" in said
    assert "stopping saved about 740 tokens, 44% of all that were planned, and 18s of GPU time" in said


def test_trials_that_machines_have_lost_are_left_out(make: Make) -> None:
    record = make()
    audit = begin_audit(record, 2, 0)
    name = next(name for name, rate in RATES.items() if rate == audit.info.spec.search.first[0][RATE])
    write_trial(audit, "one", RATES[name], "COMPLETE", [3.0, 2.0, 1.5, 1.4])
    other = audit.info.spec.search.first[1][RATE]
    write_trial(audit, "two", other, "FAILED", [3.0], failure="infrastructure")
    found = find(record, audit, 0)
    assert [trial.trial_id for trial in found.trials] == [name]
    assert found.interval == num_bounds(0, 1, 3)
    file = io.StringIO()
    say_audit(Console(file=file, width=200), found)
    assert "of all 3 trials that forecast has stopped, between 0 and 2 would have won (95%; a random" in file.getvalue()


def test_an_audit_in_which_every_trial_fails_by_its_values_is_a_result(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped trials are often those whose learning rate is too high."""
    record = make()
    audit = begin_audit(record, 1, 0)
    rate = audit.info.spec.search.first[0][RATE]

    def fit() -> None:
        write_trial(audit, "again", rate, "FAILED", [4.0], failure="diverged", error="the loss is not finite")
        (audit.paths.tune / "again").mkdir(parents=True)

    fleet = SimpleNamespace(open=lambda *_: (None, 1, ""), fault=lambda: None)
    monkeypatch.setattr(run, "compiling_early", lambda *_: nullcontext())
    monkeypatch.setattr(run, "connection", lambda *_: nullcontext())
    monkeypatch.setattr(run, "start_fleet", lambda *_: nullcontext(fleet))
    monkeypatch.setattr(run, "require_shared_folder", lambda *_: None)
    monkeypatch.setattr(run, "load", lambda *_, **__: None)
    monkeypatch.setattr(run, "make_tuner", lambda *_: SimpleNamespace(fit=fit))
    for _ in range(2):
        run.finish_audit(record, audit, lambda _: None)
        assert [trial.value for trial in find(record, audit, 0).trials] == [None]
        monkeypatch.setattr(run, "make_tuner", None)


def test_an_audit_whose_trials_machines_have_lost_says_so(make: Make) -> None:
    record = make()
    audit = begin_audit(record, 1, 0)
    rate = audit.info.spec.search.first[0][RATE]
    write_trial(audit, "again", rate, "FAILED", [4.0], failure="infrastructure", error="its worker died")
    with pytest.raises(SweepError, match="all of 1 trial failed; the first one: its worker died"):
        run.finish_audit(record, audit, lambda _: None)


@pytest.mark.parametrize(("sampled", "population"), [(4, 12), (3, 7), (8, 40)])
def test_the_interval_holds_as_often_as_it_says(sampled: int, population: int) -> None:
    for winners in range(population + 1):
        held = 0.0
        for won in range(max(0, sampled - population + winners), min(sampled, winners) + 1):
            ways = math.comb(winners, won) * math.comb(population - winners, sampled - won)
            low, high = num_bounds(won, sampled, population)
            held += (low <= winners <= high) * ways / math.comb(population, sampled)
        assert held >= CONFIDENCE - 1e-12


def test_the_interval_is_exact_where_all_were_tried_and_that_of_a_large_population_is_known() -> None:
    assert [num_bounds(won, 5, 5) for won in (0, 2, 5)] == [(0, 0), (2, 2), (5, 5)]
    low, high = num_bounds(2, 20, 100_000)
    assert (low / 100_000, high / 100_000) == pytest.approx((0.01235, 0.31698), abs=2e-4), "Clopper and Pearson's"


def test_an_audit_that_ends_early_is_continued_by_its_own_command(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make().paths.root

    def give_up(_: SweepRecord, audit: SweepRecord, *__: Any) -> None:
        raise SweepError("Ray Tune gave up", f"continue with: orchestrator resume {audit.paths.root}")

    monkeypatch.setattr(run, "finish_audit", give_up)
    error = CliRunner().invoke(app, ["audit", str(root), "--trials", "2", "--seed", "3"]).exception
    assert isinstance(error, SweepError)
    assert error.remedy == f"continue with: orchestrator audit {root} --trials 2 --seed 3"


def test_the_command_shows_an_audit_that_has_ended(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    record = make()
    audit = begin_audit(record, 3, 5)
    for name, end in {"a": 0.8, "b": 1.3, "c": 1.4}.items():
        write_trial(audit, f"again-{name}", RATES[name], "COMPLETE", [3.0, 2.0, 1.5, end])
    command = ["audit", str(record.paths.root), "--trials", "3", "--seed", "5"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.exception
    said = capfd.readouterr().out
    assert "a: stopped at step 10 at 3; ends at eval/loss 0.8: would have won" in said
    assert "1 of 3 stopped trials would have won" in said
    shown = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert capfd.readouterr().out == "", "everything but the document goes elsewhere"
    assert (shown["num_won"], shown["seed"], shown["leader"]) == (1, 5, "winner")
