"""Search algorithms and schedulers in real sweeps: their decisions, read from the records."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from searched import ONE_AT_A_TIME, PACKED, RATE, TWO_AXES, by_age, decided, losses, replayed, sweep
from tiny import DEMO

from orchestrator.cluster import connection
from orchestrator.record import (
    SweepPaths,
    SweepRecord,
    TrialResult,
    TrialState,
    read_decisions,
    read_metrics,
    read_sweep,
)
from orchestrator.spec import load_spec
from orchestrator.spec.cross_checks import MUTABLE
from orchestrator.sweep.search.factory import make_searcher
from orchestrator.training.local import run_local_trial

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

BAND = [
    "search.num_trials=10",
    RATE,
    "search.seed=4",
    "scheduler={kind: hyperband, grace_steps: 2, reduction_factor: 2}",
]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """Start Ray once for all sweeps here."""
    with connection(None):
        yield


def halved(record: SweepRecord, bracket: list[TrialResult], rungs: list[int]) -> dict[str, int]:
    """Return trial -> step for the trials of a bracket that must have been stopped, by their recorded losses."""
    stopped, number = {}, len(bracket)
    for rung in rungs:
        number = math.ceil(number / 2)
        bracket = sorted(bracket, key=lambda trial: losses(record, trial)[rung])
        stopped |= {trial.trial_id: rung for trial in bracket[number:]}
        bracket = bracket[:number]
    return stopped


def assert_hyperband(record: SweepRecord) -> None:
    """Check brackets of 3, 3 and 4 trials: stopped where the recorded losses demand it; the others are complete."""
    trials = sorted(record.trials(), key=lambda trial: trial.trial_id)
    assert len(trials) == 10
    expected = halved(record, trials[3:6], [4]) | halved(record, trials[6:], [2, 4])
    for trial in trials:
        stopped_at = expected.get(trial.trial_id)
        assert trial.state == (TrialState.COMPLETE if stopped_at is None else TrialState.STOPPED)
        assert trial.step == max(losses(record, trial)) == (stopped_at or 8)
        paths = record.paths.trial(trial.trial_id)
        assert not paths.paused.exists()
        assert not paths.lease.exists()
        assert not paths.checkpoints.exists()
        if stopped_at is not None:
            assert (trial.stopped or "").startswith("hyperband: eval/loss ")
            assert f"at step {stopped_at} is not among the best 1 in 2 of its bracket" in (trial.stopped or "")
    assert {each.trial_id: each.step for each in decided(record, "stopped")} == expected


def test_hyperband_pauses_halves_and_continues_from_the_checkpoint(tmp_path: Path) -> None:
    record = sweep(tmp_path, *BAND)
    assert_hyperband(record)
    paused, resumed = (
        {(each.trial_id, each.step) for each in decided(record, action)} for action in ("paused", "resumed")
    )
    assert resumed
    assert resumed <= paused
    name, step = min(resumed)
    trial = next(trial for trial in record.trials() if trial.trial_id == name)
    assert trial.state == TrialState.COMPLETE or trial.step > step
    # A trial that has waited has the same losses as if it had trained alone.
    rate = trial.config.training.learning_rate
    alone = SweepPaths(tmp_path / "alone")
    run_local_trial(load_spec(DEMO, [*PACKED, f"training.learning_rate={rate!r}", "search.space={}"]), alone, Silent())
    (undisturbed,) = read_sweep(alone.root).trials()
    compared = losses(record, trial)
    assert compared == pytest.approx(
        {step: losses(read_sweep(alone.root), undisturbed)[step] for step in compared}, rel=1e-4
    )


class Silent:
    """A watcher that stops nothing and prints nothing."""

    def on_step(self, step: int, total_steps: int) -> bool:
        return True

    def on_report(self, point: Any) -> bool:
        return True

    def say(self, sentence: str) -> None:
        pass


def test_brackets_continue_after_the_driver_was_killed(tmp_path: Path) -> None:
    """The driver is killed while trials wait at a rung. They are not restarted too early, nor lost."""
    options = [part for setting in [*PACKED, *BAND] for part in ("--set", setting)]
    command = [sys.executable, "-m", "orchestrator.cli"]
    paths = SweepPaths(tmp_path / "s")
    arguments = [*command, "sweep", str(DEMO), "--output", str(tmp_path), "--name", "s", *options]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(arguments, **pipes) as driver:
        deadline = time.monotonic() + 180
        while len([each for each in read_decisions(paths) if each.action == "paused"]) < 4:
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    resumed = subprocess.run([*command, "resume", str(paths.root)], check=False, **pipes)
    assert resumed.returncode == 0, resumed.stderr
    assert_hyperband(read_sweep(paths.root))


# Two rates that learn, then two that hardly do. The latter start later if not all trials have a slot: they are behind
# at any step. With similar rates the last trial to report would be the best, and no trial might ever be behind.
APART = (3e-3, 2e-3, 2e-5, 1e-5)


@pytest.mark.parametrize("engine", ["fast", "trl"])
def test_a_clone_continues_from_the_donor_at_another_rate(tmp_path: Path, engine: str) -> None:
    record = sweep(
        tmp_path,
        f"resources={{max_concurrent: 1, cpus_per_trial: {2 if engine == 'fast' else 1}}}",  # they take turns
        f"training.engine={engine}",
        f"search={{algorithm: grid, space: {{training.learning_rate: {{grid: {list(APART)}}}}}}}",
        "scheduler={kind: pbt, interval_steps: 4, quantile: 0.5, resample_probability: 0}",
        "training.steps=12",
    )
    trials = {trial.trial_id: trial for trial in record.trials()}
    assert [trial.state for trial in trials.values()] == [TrialState.COMPLETE] * 4
    assert not list(record.paths.root.glob("trials/*/exploit_checkpoints"))
    assert decided(record, "paused")
    clones = {each.trial_id: each for each in decided(record, "cloned")}
    assert clones, "no trial was exploited"
    for name, clone in clones.items():
        trial, donor = trials[name], trials[clone.donor or ""]
        assert "among the worst 50% of the trials" in clone.why
        step = int((trial.parent or "").rpartition("-")[2])
        assert trial.parent == f"{donor.trial_id}/checkpoints/checkpoint-{step}"
        assert f"from its step {step} on" in clone.why
        rate = trial.config.training.learning_rate
        assert rate == trial.config.varied["training.learning_rate"]
        assert rate in APART
        assert trial.applied["training.learning_rate"] == pytest.approx(rate), "read back from the live optimizer"
        after = [
            p for p in read_metrics(record.paths.trial(name)) if p.step > step and "train/learning_rate" in p.values
        ]
        assert after
        assert all(point.values["train/learning_rate"] == pytest.approx(rate) for point in after)
        # It continues with the weights of the donor, not with its own.
        first = losses(record, trial)[step + 2]
        before = min(losses(record, donor)[step], losses(record, donor).get(step + 2, 9))
        assert first < before + 1.5
        assert trial.adopted_tokens == 0 or step < clone.step


def test_pb2_chooses_values_within_the_ranges_with_time_in_tokens(tmp_path: Path) -> None:
    record = sweep(
        tmp_path,
        "resources.trials_per_gpu=2",
        "resources.max_concurrent=2",
        "search.num_trials=4",
        "search.space={training.learning_rate: {loguniform: [1e-5, 1e-2]}, lora.dropout: {uniform: [0.0, 0.5]}}",
        f"search.first={[{'training.learning_rate': rate, 'lora.dropout': 0.1} for rate in APART]}",
        "scheduler={kind: pb2, interval_tokens: 500, quantile: 0.5}",
        "training.steps=12",
    )
    trials = {trial.trial_id: trial for trial in record.trials()}
    assert [trial.state for trial in trials.values()] == [TrialState.COMPLETE] * 4
    clones = {each.trial_id: each for each in decided(record, "cloned")}
    assert clones
    for name in clones:
        config, applied = trials[name].config, trials[name].applied
        assert 1e-5 <= config.training.learning_rate <= 1e-2
        assert 0 <= config.lora.dropout <= 0.5
        assert applied["training.learning_rate"] == pytest.approx(config.training.learning_rate, rel=1e-5)
        assert applied["lora.dropout"] == pytest.approx(config.lora.dropout, abs=1e-3)
        assert config.lora.dropout != 0.1, "it differs from the initial value of all trials"
    steps = {each.step for each in clones.values()}
    points = [p for trial in trials for p in read_metrics(record.paths.trial(trial)) if p.step in steps]
    assert min(point.tokens for point in points) >= 500


def between(ranges: dict[str, list[float]], rate: float) -> dict[str, float]:
    """Return a point of these ranges: this learning rate, and the middle of the other ranges."""
    middles = {path: (low + high) / 2 for path, (low, high) in ranges.items()}
    return middles | {"training.learning_rate": rate, "lora.rank": 10}


@pytest.mark.parametrize("engine", ["fast", "trl"])
def test_every_mutable_field_takes_effect_in_a_clone(tmp_path: Path, engine: str) -> None:
    ranges = {
        "training.learning_rate": [1e-6, 5e-3],
        "training.weight_decay": [0.01, 0.5],
        "training.max_grad_norm": [0.1, 2.0],
        "lora.dropout": [0.05, 0.5],
        "lora.alpha": [8.0, 24.0],
        "lora.rank": [4, 16],
    }
    assert set(ranges) == set(MUTABLE)
    axes = {path: {"randint" if path == "lora.rank" else "uniform": ends} for path, ends in ranges.items()}
    record = sweep(
        tmp_path,
        f"resources={{max_concurrent: 2, cpus_per_trial: {2 if engine == 'fast' else 1}}}",
        f"training.engine={engine}",
        "search.num_trials=4",
        f"search.space={axes}",
        f"search.first={[between(ranges, rate) for rate in APART]}",
        "scheduler={kind: pbt, interval_steps: 2, quantile: 0.5, resample_probability: 0}",
        "training.steps=8",
    )
    clones = {each.trial_id for each in decided(record, "cloned")}
    assert clones, "no trial was exploited"
    for trial in record.trials():
        assert trial.state == TrialState.COMPLETE
        for path in MUTABLE:
            assert trial.applied[path] == pytest.approx(trial.config.varied[path], rel=1e-6), f"{path}, read back"
    for clone in (trial for trial in record.trials() if trial.trial_id in clones):
        assert clone.parent, "it has no checkpoint of a donor as parent"
        last = [each for each in decided(record, "cloned") if each.trial_id == clone.trial_id][-1]
        assert all(f"{path} {clone.config.varied[path]:.6g}" in last.why for path in MUTABLE), (
            "the values are those of the decision"
        )


@pytest.mark.parametrize(
    ("algorithm", "num_trials"),
    [
        ("{algorithm: optuna, startup_trials: 2}", 5),
        (
            "{algorithm: optuna, sampler: cmaes}",
            9,
        ),  # it learns once per generation of 6 (two axes), after one random trial
        ("{algorithm: hyperopt, startup_trials: 2}", 5),
    ],
    ids=["tpe", "cmaes", "hyperopt"],
)
def test_points_follow_from_the_seed_and_the_recorded_losses(tmp_path: Path, algorithm: str, num_trials: int) -> None:
    settings = [f"search={algorithm}", f"search.num_trials={num_trials}", TWO_AXES, "search.seed=3"]
    record = sweep(tmp_path, *settings, *ONE_AT_A_TIME, "scheduler.kind=none", "training.steps=2")
    spec, trials = record.info.spec, by_age(record)
    points = [trial.config.varied for trial in trials]
    values = [trial.best.value for trial in trials if trial.best]
    assert replayed(spec, values) == points
    assert replayed(spec, [-value for value in values]) != points, "the losses make a difference"
    other = spec.model_copy(update={"search": spec.search.model_copy(update={"seed": 4})})
    assert replayed(other, values)[0] != points[0]


def test_bohb_fills_brackets_and_learns_from_their_losses(tmp_path: Path) -> None:
    pytest.importorskip("hpbandster", reason="the extra bohb, which needs a C compiler")
    record = sweep(
        tmp_path,
        "search={algorithm: bohb, startup_trials: 2}",
        "search.num_trials=7",
        RATE,
        "search.seed=1",
        "scheduler={kind: bohb, grace_steps: 2, reduction_factor: 2}",
        "resources.trials_per_gpu=1",
        "resources.max_concurrent=1",
    )
    trials = by_age(record)
    assert len(trials) == 7
    expected = halved(record, trials[:4], [2, 4]) | halved(record, trials[4:7], [4])  # the largest bracket first
    assert {each.trial_id: each.step for each in decided(record, "stopped")} == expected
    for trial in trials:
        assert trial.state == (TrialState.STOPPED if trial.trial_id in expected else TrialState.COMPLETE)
        assert trial.step == expected.get(trial.trial_id, 8)
    points = [trial.config.varied for trial in trials]
    without_reports = make_searcher(record.info.spec, max_concurrent=99)
    drawn = [without_reports.suggest(str(i)) for i in range(7)]
    assert points[:4] == drawn[:4], "nothing is known before the first rung"
    assert points[4:] != drawn[4:], "reports make a difference"


def test_a_spent_budget_stops_running_trials_and_starts_no_more(tmp_path: Path) -> None:
    said: list[str] = []
    record = sweep(
        tmp_path,
        "search.num_trials=8",
        RATE,
        "search.budget.tokens=1000",  # one trial alone has 2,291
        "scheduler.kind=none",
        "resources.max_concurrent=3",
        say=said.append,
    )
    trials = record.trials()
    assert 1 <= len(trials) <= 3
    spent = [trial for trial in trials if (trial.stopped or "").startswith("the budget is spent: ")]
    assert spent
    for trial in trials:
        assert trial.state in (TrialState.STOPPED, TrialState.COMPLETE)
        assert trial.step == max(losses(record, trial))
        assert not record.paths.trial(trial.trial_id).lease.exists()
    over = record.budget_spent()
    assert over is not None
    assert over.limit == "tokens"
    assert 1000 <= over.spent <= sum(trial.tokens for trial in trials)
    assert said[-1] == f"{over}: {len(trials)} of 8 trials begun"
    best = record.finished()[0]
    assert record.adapter(best).is_dir()
