"""Trials of a made-up sweep with many axes, for tests of tables and views."""

import sys
import time
from typing import Any

from rich.console import Console

from orchestrator.record import BestPoint, TrialResult, TrialState
from orchestrator.report.live import SweepView
from orchestrator.report.tables import TrialsTable, axes_of
from orchestrator.spec import SweepSpec, parse_spec

SPACE: dict[str, Any] = {
    "lora.rank": {"choice": [4, 8, 16, 32, 64, 128]},
    "lora.dropout": {"choice": [0.0, 0.05, 0.125]},
    "training.learning_rate": {"loguniform": [1e-5, 1e-2]},
    "training.weight_decay": {"choice": [0.0, 0.01]},
    "training.max_grad_norm": {"choice": [0.3, 1.0]},
    "training.warmup": {"choice": [0.0, 0.03, 0.1]},
}
POINT = (64, 0.125, 0.000316, 0.01, 0.3, 0.03)
STATES = [TrialState.COMPLETE] * 8 + [TrialState.STOPPED] * 10 + [TrialState.RUNNING] * 4 + [TrialState.FAILED] * 2


def made_up_spec(num_axes: int = 6) -> SweepSpec:
    """Return an experiment with so many axes."""
    return parse_spec(
        {
            "base": {"model": "embedded"},
            "data": {"source": "embedded", "format": "template", "template": "{question} {answer}"},
            "training": {"steps": 2000},
            "evaluation": {"metrics": ["exact_match"]},
            "search": {"algorithm": "random", "num_trials": 100, "space": dict(list(SPACE.items())[:num_axes])},
            "scheduler": {"kind": "none"},
        }
    )


def made_up_trials(spec: SweepSpec, number: int) -> list[TrialResult]:
    """Return trials in all states, best first, each with a metric, a step and values of its own."""
    found = []
    for index in range(number):
        state = STATES[index % len(STATES)]
        value = None if state == TrialState.FAILED else 0.4012 + index / 1000
        best = value and BestPoint(
            value=value,
            step=1000 + index,
            values={"eval/loss": value, "eval/token_accuracy": 0.5, "eval/exact_match": 0.25},
            adapter="adapters/step-7",
        )
        found.append(
            TrialResult(
                trial_id=f"5a91c_{index:05d}",
                state=state,
                config=spec.trial_config(dict(zip(spec.search.space, POINT, strict=False))),
                metric="eval/loss",
                mode="min",
                best=best or None,
                step=1500 + index,
                total_steps=2000,
                tokens=10_000 * index,
                seconds=3700.0,
                train_loss=0.512,
                error="the loss is nan" if state == TrialState.FAILED else None,
            )
        )
    return found


if __name__ == "__main__":
    what, num_trials, axes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    experiment = made_up_spec(axes)
    made = made_up_trials(experiment, num_trials)
    if what == "table":
        Console().print(TrialsTable(made, axes=axes_of(experiment)))
    else:
        with SweepView(Console(), experiment, lambda: 100, "sweep of 100 trials in runs/x") as view:
            for part in (4, 3, 2, 1):  # so that a pace can be measured
                view.update([trial.model_copy(update={"step": trial.step // part}) for trial in made])
                time.sleep(0.05)
            time.sleep(0.8)
            if what == "interrupted":
                raise SystemExit(130)
