"""Replay recorded sweeps: what a view saw of them, second by second."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.record import TrialResult, TrialState
from orchestrator.report.time_left import TimeLeft
from orchestrator.spec import SweepSpec, parse_spec

FOLDER = Path(__file__).with_name("recordings")


@dataclass(frozen=True)
class Estimate:
    """A range at one moment of a sweep, and the truth."""

    at: float
    """Share of the sweep's time that has passed."""
    low: float
    high: float
    truth: float
    """Seconds that were really left."""


def replay(file: Path) -> list[Estimate]:
    """Return the estimates at some forty moments of a recorded sweep, as far as there is one.

    A recording has for each trial: the seconds of its begin and end, its last state, its planned steps, and the seconds
    and steps of its logged points.
    """
    recorded = json.loads(file.read_text())
    spec = _spec_of(recorded)
    now = 0.0
    time_left = TimeLeft(spec, clock=lambda: now)
    config, found = spec.trial_config({}), []
    for second in range(0, int(recorded["end"]) + 1, max(int(recorded["end"] / 40), 1)):
        now = float(second)
        trials = []
        for index, (begin, end, state, total, points) in enumerate(recorded["trials"]):
            if begin > now:
                continue
            step = max([0, *(step for at, step in points if at <= now)])
            trials.append(
                TrialResult(
                    trial_id=str(index),
                    state=TrialState(state) if end <= now else TrialState.RUNNING,
                    config=config,
                    metric="eval/loss",
                    mode="min",
                    step=step,
                    total_steps=total if step else None,
                )
            )
        time_left.update(trials, len(recorded["trials"]))
        if (estimate := time_left.range()) is not None:
            found.append(Estimate(now / recorded["end"], *estimate, recorded["end"] - now))
    return found


def _spec_of(recorded: dict[str, Any]) -> SweepSpec:
    return parse_spec(
        {
            "base": {"model": "embedded"},
            "data": {"source": "embedded", "format": "template", "template": "{question} {answer}"},
            "training": {"steps": recorded["steps"], "eval_steps": recorded["eval_steps"]},
            "search": {
                "algorithm": "random",
                "num_trials": len(recorded["trials"]),
                "space": {"training.learning_rate": {"loguniform": [1e-4, 1e-2]}},
            },
            "scheduler": {name: value for name, value in recorded["scheduler"].items() if value is not None},
            "resources": {"max_concurrent": recorded["max_concurrent"]},
        }
    )
