"""The forecast's learning rates are those of transformers' own schedules."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from orchestrator.spec.sections import TrainingSection
from orchestrator.spec.sections.training import Schedule
from orchestrator.sweep.schedulers.forecast.rates import learning_rates
from orchestrator.training.engines.sft import _schedule_options

STEPS, RATE = 97, 3e-3
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cosine_with_restarts": [{"cycles": 3}, {}],
    "cosine_with_min_lr": [{"final_rate": 0.1}],
    "polynomial": [{"final_rate": 0.2}, {}],
    "warmup_stable_decay": [{"decay_steps": 30, "final_rate": 0.1}, {"decay_steps": 20}],
}
CASES = [(name, options) for name in Schedule.__args__ for options in OPTIONS.get(name, [{}])]  # type: ignore[attr-defined]


@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 7.5])
@pytest.mark.parametrize(("schedule", "options"), CASES, ids=str)
def test_each_schedule_is_that_of_transformers(schedule: str, options: dict[str, Any], warmup: float) -> None:
    if schedule == "constant":
        warmup = 0
    training = TrainingSection(steps=STEPS, learning_rate=RATE, schedule=schedule, warmup=warmup, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    num_warmup = int(warmup) if warmup >= 1 else int(np.ceil(warmup * STEPS))
    theirs = get_scheduler(
        schedule, optimizer, num_warmup, STEPS, scheduler_specific_kwargs=_schedule_options(training)
    )
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert learning_rates(training, STEPS) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_an_unknown_schedule_is_an_error() -> None:
    training = TrainingSection(steps=STEPS).model_copy(update={"schedule": "reduce_lr_on_plateau"})
    with pytest.raises(KeyError, match="reduce_lr_on_plateau"):
        learning_rates(training, STEPS)
