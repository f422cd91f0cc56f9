"""Schedulers and trials for simulated sweeps, see `make_stage` in `conftest.py`."""

from collections.abc import Callable
from typing import Any

from orchestrator.record import SweepInfo, SweepPaths, write_record
from orchestrator.spec import SweepSpec

ASHA = {"kind": "asha", "grace_steps": 10, "reduction_factor": 2}
MEDIAN = {"kind": "median", "grace_steps": 10, "min_trials": 2}
BAND = {"kind": "hyperband", "grace_steps": 10, "reduction_factor": 2}
PBT = {"kind": "pbt", "interval_steps": 10, "quantile": 0.5}

MakeStage = Callable[..., Any]


def falling(level: float) -> list[float]:
    """Return the losses of a trial with four evaluations; a lower level is better."""
    return [level + 0.4, level + 0.3, level + 0.2, level + 0.1]


def band() -> dict[str, list[float]]:
    """Return trials of three brackets: 0-2 run to their end, 3-5 meet a rung at 20 steps, 6-9 rungs at 10 and 20."""
    levels = [5, 6, 7, 3, 1, 2, 0.5, 0.2, 9, 8]
    return {f"t{i}": falling(level) for i, level in enumerate(levels)}


def begin_record(paths: SweepPaths, spec: SweepSpec) -> None:
    """Write the record of a sweep that has no trials yet."""
    info = SweepInfo(
        name="sweep", created="2026-01-01T00:00:00+00:00", spec=spec, is_single_trial=False, data_fingerprint="f",
        num_train=9, num_held_out=1, num_truncated=0, num_dropped=0, num_shared=0, versions={}, git_commit=None,
    )  # fmt: skip
    write_record(paths.sweep, info)


def steered(stage: Any) -> Any:
    """Give a stage what steering asks of Tune's controller and of the search."""
    stage.calls = []
    for name in ("forget", "set_aside", "take_back", "take_in", "extend"):
        setattr(stage.search_alg, name, lambda *args, name=name: stage.calls.append((name, args[0])))
    stage.search_alg.take_dropped = list

    def add_trial(trial: Any) -> None:
        stage.losses[trial.trial_id] = falling(0)
        stage.trials.append(trial)
        stage.conductor.on_trial_add(stage, trial)

    stage.add_trial = add_trial
    return stage
