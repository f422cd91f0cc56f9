"""A sweep that takes the trials of an earlier one as evidence, and goes on without its folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from searched import by_age, decided

from orchestrator.record import SweepPaths, read_sweep
from orchestrator.record.extend import extend_sweep
from orchestrator.spec import parse_spec
from orchestrator.spec.search import RATE
from orchestrator.sweep import resume_sweep, run_sweep

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

EXPERIMENT: dict[str, Any] = {
    "base": {"model": "embedded", "compute_dtype": "float32"},
    "data": {
        "source": "embedded", "format": "template", "template": "<s>[INST] {question} [/INST] {answer} </s>",
        "loss_on": "completion", "max_length": 64, "max_rows": 60, "held_out": {"count": 8},
    },
    "training": {"steps": 4, "eval_steps": 2},
    "search": {"num_trials": 3, "space": {RATE: {"loguniform": [1e-4, 1e-2]}, "lora.rank": {"choice": [4, 8]}}},
    "scheduler": {"kind": "none"},
    "resources": {"max_concurrent": 1},
    "tracking": {"tensorboard": False, "wandb": {"mode": "disabled"}},
}  # fmt: skip


def test_a_warm_sweep_begins_at_the_best_earlier_trial_and_resumes_without_it(tmp_path: Path) -> None:
    first = run_sweep(parse_spec(EXPERIMENT), SweepPaths(tmp_path / "first"), lambda _: None)
    best = first.trials()[0].config.varied
    said: list[str] = []
    fewer = EXPERIMENT | {"search": EXPERIMENT["search"] | {"num_trials": 2, "seed": 1}}
    second = run_sweep(
        parse_spec(fewer), SweepPaths(tmp_path / "second"), lambda _: None, say=said.append, warm_from=[first]
    )
    assert any("warm start: 3 finished trials of sweep first" in line for line in said)
    shutil.rmtree(tmp_path / "first")

    extended = extend_sweep(read_sweep(second.paths.root), 3, [])
    resumed = resume_sweep(extended, lambda _: None)
    trials = by_age(resumed)
    assert len(trials) == 3
    assert trials[0].config.varied == best
    assert [len(each.trials) for each in resumed.info.prior_sweeps] == [3]
    reasons = [each.why for each in decided(resumed, "chosen")]
    assert reasons[0].startswith("begins at the prior")
    assert " on 1 results and 2 of earlier sweeps" in reasons[1]
    assert " on 2 results and 1 of earlier sweeps" in reasons[2]
