"""The public Python API: run, resume and open a sweep."""

from pathlib import Path

import pytest
from tiny import DEMO, TINY

from orchestrator import load_spec, open_sweep, resume, run
from orchestrator.errors import RecordError, RequestError
from orchestrator.record import TrialState

pytestmark = pytest.mark.slow


def test_a_trial_without_search_is_run_opened_and_resumed(tmp_path: Path) -> None:
    spec = load_spec(DEMO, [*TINY, "training.steps=4"])
    said: list[str] = []
    sweep = run(spec, "one", tmp_path, without_search=True, say=said.append)
    (trial,) = sweep.record.trials()
    assert list(sweep.trials()["state"]) == ["COMPLETE"]
    assert (trial.state, trial.step) == (TrialState.COMPLETE, 4)
    assert any(line.startswith("step 4: eval/loss ") for line in said)
    assert sweep.record.paths.root == tmp_path / "one"
    assert open_sweep("one", tmp_path).best().trial == trial
    assert resume("one", tmp_path, say=said.append).record.trials() == [trial], "a finished trial does not run again"
    with pytest.raises(RequestError, match="already exists"):
        run(spec, "one", tmp_path, without_search=True)


def test_a_sweep_is_run_on_a_local_ray(tmp_path: Path) -> None:
    spec = load_spec(DEMO, [*TINY, "training.steps=4", "search.num_trials=2", "scheduler.kind=none"])
    updates: list[int] = []
    sweep = run(spec, "two", tmp_path, watch=lambda trials: updates.append(len(trials)), say=lambda _: None)
    assert [trial.state for trial in sweep.record.trials()] == [TrialState.COMPLETE] * 2
    assert updates[-1] == 2


def test_a_sweep_takes_earlier_ones_as_evidence(tmp_path: Path) -> None:
    chosen = [*TINY, "training.steps=4", "scheduler.kind=none", "search.algorithm=auto"]
    earlier = run(load_spec(DEMO, [*chosen, "search.num_trials=2"]), "first", tmp_path, say=lambda _: None)
    spec = load_spec(DEMO, [*chosen, "search.num_trials=1", "search.startup_trials=null"])
    sweep = run(spec, "second", tmp_path, warm_from=["first"], say=lambda _: None)
    (prior,) = sweep.record.info.prior_sweeps
    assert (prior.name, len(prior.trials)) == ("first", 2)
    with pytest.raises(RequestError, match="warm_from is evidence for a search"):
        run(spec, "third", tmp_path, without_search=True, warm_from=[earlier.record.paths.root])


def test_a_sweep_that_does_not_exist_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RecordError):
        resume("none", tmp_path)
