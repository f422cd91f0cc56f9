"""The searcher learns from trials that fail by their own values, not from failures of a machine. Nothing trains."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from simulated import begin_record

from orchestrator.errors import FailureCause
from orchestrator.record import SweepPaths, TrialResult, TrialState, end_trial, read_sweep
from orchestrator.spec import parse_spec
from orchestrator.sweep.schedulers.conductor import Conductor
from orchestrator.sweep.search.factory import make_searcher

LIMIT = 1.0
"""A learning rate above this limit diverges. Below it, a higher rate has a lower loss."""
RANGE = {"training.learning_rate": {"loguniform": [1e-5, 1e5]}}
DROPOUT = {"lora.dropout": {"uniform": [0.0, 0.5]}}
BOHB = pytest.mark.skipif(find_spec("hpbandster") is None, reason="the extra bohb, which needs a C compiler")

Search = Callable[..., "Simulation"]


class Simulation:
    """Runs one trial at a time and makes the calls of Tune's controller in its order (ray 2.60)."""

    def __init__(self, paths: SweepPaths) -> None:
        self.record = read_sweep(paths.root)
        self.rates: list[float] = []
        self.start_driver()

    def start_driver(self) -> None:
        """Start a new driver with a new searcher."""
        self.searcher = make_searcher(self.record.info.spec, max_concurrent=1)
        self.search_alg = SimpleNamespace(searcher=self.searcher, set_finished=lambda: None)
        self.conductor = Conductor(self.record, num_slots=1)
        self.conductor.set_search_properties("eval/loss", self.record.info.spec.search.resolved_mode)

    def run(self, num_trials: int, failure: FailureCause | None) -> int:
        """Run more trials. Those that diverge fail for this cause, or without a result. Return their number."""
        num_failed = 0
        for _ in range(num_trials):
            name = f"t{len(self.rates)}"
            point = self.searcher.suggest(name)
            self.rates.append(point["training.learning_rate"])
            trial = Trial("idle", stub=True, trial_id=name, config=point)
            trial.storage = SimpleNamespace(experiment_fs_path=str(self.record.paths.tune))
            trial.set_status(Trial.RUNNING)
            self.conductor.on_trial_add(self, trial)
            if self.rates[-1] > LIMIT:
                num_failed += 1
                self._fail(trial, failure)
            else:
                self._complete(trial)
        return num_failed

    def _complete(self, trial: Any) -> None:
        sign = 1 if self.record.info.spec.search.resolved_mode == "min" else -1
        value = -sign * math.log10(self.rates[-1])
        for step in (3, 6, 9):
            report = {self.record.info.spec.search.metric: value, "step": step, "training_iteration": step // 3}
            report |= {"tokens": step, "hyperband_info": {"budget": step // 3}}
            self.searcher.on_trial_result(trial.trial_id, report)
        self.searcher.on_trial_complete(trial.trial_id, report)
        trial.set_status(Trial.TERMINATED)

    def _fail(self, trial: Any, failure: FailureCause | None) -> None:
        if failure is not None:  # otherwise the driver writes the result later
            spec, paths = self.record.info.spec, self.record.paths.trial(trial.trial_id)
            paths.root.mkdir(parents=True, exist_ok=True)
            result = TrialResult(
                trial_id=trial.trial_id, state=TrialState.FAILED, config=spec.trial_config(trial.config),
                metric=spec.search.metric, mode=spec.search.resolved_mode, error="no", failure=failure,
            )  # fmt: skip
            end_trial(paths, result)
        self.conductor.on_trial_error(self, trial)
        self.searcher.on_trial_complete(trial.trial_id, error=True)
        trial.set_status(Trial.ERROR)

    def get_trials(self) -> list[Any]:
        return []


@pytest.fixture
def simulate(document: dict[str, Any], tmp_path: Path) -> Search:
    """`simulate("optuna", seed=1)`: a search over learning rates, half of which diverge."""

    def make(algorithm: str, **search: Any) -> Simulation:
        bohb = {"kind": "bohb", "grace_steps": 3, "reduction_factor": 2}
        section = {"algorithm": algorithm, "space": RANGE, "num_trials": 40, **search}
        spec = parse_spec(
            document
            | {"training": {"steps": 9, "eval_steps": 3}, "search": section}
            | {"scheduler": bohb if algorithm == "bohb" else {"kind": "none"}}
        )
        paths = SweepPaths(tmp_path / f"sweep-{len([*tmp_path.iterdir()])}")
        begin_record(paths, spec)
        return Simulation(paths)

    return make


@pytest.mark.parametrize(
    ("search", "num_trials", "unreported", "reported"),
    [
        ({"algorithm": "optuna", "startup_trials": 4}, 16, 12.0, 6.6),
        ({"algorithm": "optuna", "sampler": "cmaes", "space": RANGE | DROPOUT}, 40, 16.5, 13.7),
        ({"algorithm": "hyperopt", "startup_trials": 4}, 16, 12.0, 7.4),
        pytest.param({"algorithm": "bohb"}, 16, 7.1, 4.6, marks=BOHB),
    ],
    ids=["tpe", "cmaes", "hyperopt", "bohb"],
)
def test_fewer_draws_diverge_when_divergence_is_reported(
    search: dict[str, Any], num_trials: int, unreported: float, reported: float, simulate: Search
) -> None:
    """Half of the range diverges. The numbers are means over ten seeds."""
    means = {
        cause: sum(simulate(**search, seed=seed).run(num_trials, cause) for seed in range(10)) / 10
        for cause in ("infrastructure", "diverged")
    }
    assert means["infrastructure"] == pytest.approx(unreported, abs=0.5)
    assert means["diverged"] == pytest.approx(reported, abs=0.5)


@pytest.mark.parametrize("cause", ["diverged", "out_of_memory", "configuration"])
@pytest.mark.parametrize(("metric", "worst"), [("eval/loss", math.inf), ("eval/token_accuracy", -math.inf)])
def test_a_failure_by_its_values_is_worse_than_any_value(
    cause: FailureCause, metric: str, worst: float, simulate: Search
) -> None:
    search = simulate("optuna", metric=metric, first=[{"training.learning_rate": 10.0}])
    assert search.run(1, cause) == 1
    (observed,) = search.searcher.searcher._ot_study.trials
    assert (observed.state.name, observed.value) == ("COMPLETE", worst)


@pytest.mark.parametrize("cause", ["infrastructure", None])
def test_a_failure_of_a_machine_says_nothing_about_the_values(cause: FailureCause | None, simulate: Search) -> None:
    search = simulate("optuna", first=[{"training.learning_rate": 10.0}])
    assert search.run(1, cause) == 1
    (observed,) = search.searcher.searcher._ot_study.trials
    assert (observed.state.name, observed.value) == ("FAIL", None)


@BOHB
def test_a_failure_is_reported_to_bohb_at_the_rung_that_was_not_reached(simulate: Search) -> None:
    search = simulate("bohb", first=[{"training.learning_rate": 10.0}], num_trials=9)
    rung = 1  # the largest bracket comes first: its trials meet at the grace period
    assert search.run(1, "diverged") == 1
    assert search.searcher.bohber.losses == {rung: [math.inf]}


@pytest.mark.parametrize("algorithm", ["optuna", "hyperopt", pytest.param("bohb", marks=BOHB)])
def test_what_is_learned_from_divergence_survives_a_resume(algorithm: str, simulate: Search, tmp_path: Path) -> None:
    settings = {"seed": 3, **({} if algorithm == "bohb" else {"startup_trials": 4})}
    whole, search = simulate(algorithm, **settings), simulate(algorithm, **settings)
    whole.run(16, "diverged")
    search.run(10, "diverged")
    state = search.conductor.state()
    search.searcher.save(str(tmp_path / "state"))
    search.start_driver()
    search.searcher.restore(str(tmp_path / "state"))
    assert state
    search.run(6, "diverged")
    assert search.rates == whole.rates
    assert max(search.rates) > LIMIT
