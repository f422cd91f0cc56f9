"""`check` predicts the effect of a scheduler as Ray Tune's scheduler has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.record import SweepPaths
from orchestrator.spec import load_spec
from orchestrator.spec.scheduler_effect import _brackets, require_scheduler_effect
from orchestrator.sweep.schedulers.brackets import Bohb, HyperBand
from orchestrator.training.start import start_sweep

MakeStage = Callable[..., Any]


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("units", [2, 4, 5, 8, 9, 16, 27, 49, 81, 100])
def test_brackets_are_those_of_ray_tune(units: int, factor: int) -> None:
    if units < factor:
        return
    for scheduler in (HyperBand(max_t=units, reduction_factor=factor), Bohb(max_t=units, reduction_factor=factor)):
        sizes = [scheduler._get_n0(s) for s in range(scheduler._s_max_1) if scheduler._get_r0(s)]
        firsts = [scheduler._get_r0(s) for s in range(scheduler._s_max_1) if s and scheduler._get_r0(s)]
        brackets = _brackets(units, factor)
        assert [size for size, _ in brackets] == sizes
        assert [rungs[0] for _, rungs in brackets if rungs] == firsts


def is_refused(stage: Any) -> bool:
    try:
        require_scheduler_effect(stage.conductor._spec)
    except SpecError:
        return True
    return False


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 7, 11])
@pytest.mark.parametrize(
    "scheduler",
    [
        {"kind": "asha", "grace_steps": 10, "reduction_factor": 3},
        {"kind": "asha", "grace_steps": 30, "reduction_factor": 3},
        {"kind": "asha", "grace_steps": 40, "reduction_factor": 3},
        {"kind": "median", "grace_steps": 10, "min_trials": 3},
        {"kind": "median", "grace_steps": 30, "min_trials": 1},
        {"kind": "median", "grace_steps": 40, "min_trials": 1},
        {"kind": "hyperband", "grace_steps": 10, "reduction_factor": 2},
        {"kind": "hyperband", "grace_steps": 10, "reduction_factor": 3},
        {"kind": "hyperband", "grace_steps": 20, "max_steps": 80, "reduction_factor": 2},
        {"kind": "bohb", "grace_steps": 10, "reduction_factor": 2},
        {"kind": "bohb", "grace_steps": 10, "reduction_factor": 3},
    ],
    ids=str,
)
def test_a_refused_scheduler_would_stop_no_trial_and_an_accepted_one_may(
    scheduler: dict[str, Any], number: int, make_stage: MakeStage
) -> None:
    """Each trial is worse than all before it: the worst order for rules that compare with earlier trials."""
    algorithm = "bohb" if scheduler["kind"] == "bohb" else "random"
    stage = make_stage(scheduler, num_slots=1, num_trials=number, algorithm=algorithm)
    trials = {f"t{i:02}": [i + 0.4, i + 0.3, i + 0.2, i + 0.1] for i in range(number)}
    if algorithm == "bohb":
        stage.to_come = trials
    else:
        stage.add(**trials)
    stage.run()
    assert bool(stage.decisions("stopped")) != is_refused(stage)


def test_rows_of_an_epoch_are_counted_before_anything_is_written(tmp_path: Path) -> None:
    epochs = [
        "data.max_rows=240", "data.held_out={count: 40}", "training.steps=null", "training.epochs=2",
        "training.eval_steps=50", "scheduler={kind: asha}",
    ]  # fmt: skip
    paths = SweepPaths(tmp_path / "runs" / "sweep")
    with pytest.raises(SpecError, match=r"eval_steps 50 no trial is evaluated before its last step \(50\)"):
        start_sweep(load_spec("experiments/demo.yaml", epochs), paths)
    assert not list(tmp_path.iterdir())
    info = start_sweep(load_spec("experiments/demo.yaml", epochs), paths, is_single_trial=True)
    assert info.num_train == 200
