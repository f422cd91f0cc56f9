"""Fixtures of the unit tests: an experiment, and sweep folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.bundle import REQUIRED
from orchestrator.record import BestPoint, SweepInfo, SweepPaths, TrialResult, TrialState, write_record
from orchestrator.spec import parse_spec

MakeSweep = Callable[..., SweepPaths]


@pytest.fixture
def document() -> dict[str, Any]:
    """The smallest valid experiment."""
    return {
        "base": {"model": "embedded"},
        "data": {"source": "embedded", "format": "template", "template": "{question} {answer}"},
    }


@pytest.fixture
def make_sweep(document: dict[str, Any]) -> MakeSweep:
    """Return a function that writes a sweep folder.

    Example: `make_sweep(folder, {"a": ("COMPLETE", 0.5)}, seed=3)`. A value of None is a trial without an evaluation.
    """

    def make(folder: Path, trials: dict[str, tuple[str, float | None]], **search: Any) -> SweepPaths:
        spec = parse_spec(document | {"search": search})
        paths = SweepPaths(folder)
        info = SweepInfo(
            name=paths.name,
            created="2026-01-01T00:00:00+00:00",
            spec=spec,
            is_single_trial=False,
            data_fingerprint="f",
            num_train=9,
            num_held_out=1,
            num_truncated=0,
            num_dropped=0,
            num_shared=0,
            versions={},
            git_commit=None,
        )
        write_record(paths.sweep, info)
        for trial_id, (state, value) in trials.items():
            trial = paths.trial(trial_id)
            result = TrialResult(
                trial_id=trial_id,
                state=TrialState(state),
                config=spec.trial_config({}),
                metric=spec.search.metric,
                mode=spec.search.resolved_mode,
                best=None
                if value is None
                else BestPoint(value=value, step=7, values={spec.search.metric: value}, adapter="adapters/step-7"),
            )
            write_record(trial.config, result.config)
            write_record(trial.progress if state in ("RUNNING", "PENDING") else trial.result, result)
            if value is not None:
                trial.adapter(7).mkdir(parents=True)
                for name in REQUIRED:
                    (trial.adapter(7) / name).touch()
        return paths

    return make
