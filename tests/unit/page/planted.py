"""Sweeps with planted effects, written as records: the learning rate decides, other fields do nothing."""

import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from orchestrator.adapters.bundle import REQUIRED, SCORES
from orchestrator.record import (
    BestPoint,
    Decision,
    MetricPoint,
    RowScores,
    SweepInfo,
    SweepPaths,
    TrialResult,
    TrialState,
    write_record,
)
from orchestrator.record.checked import read_record
from orchestrator.record.decisions import append_decision
from orchestrator.record.files import write_atomic
from orchestrator.spec import parse_spec

STEPS, EVERY, ROWS = 200, 20, 40
LEARNING = 0.8
"""How much of the log loss is learned, in units of `phi`."""
HTML = "<img src=x onerror=document.title='taken'>"
SCRIPT = "</script><script>document.title='taken'</script>"
SPACE: dict[str, Any] = {
    "training.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "lora.rank": {"choice": [4, 8, 16, 32]},
    "lora.dropout": {"uniform": [0.0, 0.1]},
}


def phi(step: int, values: dict[str, Any]) -> float:
    """Return what is left to learn at a step, a power law of the summed learning rate (docs/forecast.md)."""
    rate = values.get("training.learning_rate", 1e-3)
    return float((step * rate / (0.05 * STEPS * 1e-3)) ** -0.3)


def plant(
    folder: Path,
    num: int = 24,
    *,
    effect: float = 1.0,
    stops: bool = True,
    names: str = "t",
    failed: int = 0,
    planned: int | None = None,
    seed: int = 0,
    **search: Any,
) -> SweepPaths:
    """Write a sweep of `num` trials whose log loss falls by `effect` from the lowest to the highest rate.

    Args:
        folder: the sweep's folder.
        num: number of trials.
        effect: fall of the log loss over the range of learning rates.
        stops: whether every third trial stopped at step 60.
        names: start of the trials' names.
        failed: the last trials that failed, with HTML in their errors.
        planned: number of trials of the experiment; default `num`.
        seed: seed of the draws.
        search: further fields of the search section.
    """
    spec = parse_spec(
        {
            "base": {"model": "embedded"},
            "data": {"source": "embedded", "format": "template", "template": "{question} {answer}"},
            "training": {"steps": STEPS, "eval_steps": EVERY, "schedule": "constant", "warmup": 0},
            "search": {"algorithm": "random", "space": SPACE, "num_trials": planned or max(num, 1)} | search,
            "scheduler": {"kind": "forecast" if (planned or num) > 1 else "none"},
        }
    )
    paths, draws = SweepPaths(folder), random.Random(seed)
    info = SweepInfo(
        name=paths.name, created="2026-01-01T00:00:00+00:00", spec=spec, is_single_trial=False, data_fingerprint="f",
        num_train=320, num_held_out=ROWS, num_truncated=0, num_dropped=0, num_shared=0, versions={"torch": "2"},
        git_commit="abc",
    )  # fmt: skip
    write_record(paths.sweep, info)
    row_noise = [draws.gauss(0, 0.3) for _ in range(ROWS)]
    for i in range(num):
        draws = random.Random(f"{seed} {i}")  # so that a trial that stops early has the curve of one that does not
        values = {
            name: spec.search.space[name].decode(spec.search.space[name].draw(draws)) for name in spec.search.space
        }
        place = math.log(values.get("training.learning_rate", 1e-4) / 1e-4) / math.log(100)
        final = math.exp(-0.5 - effect * place + draws.gauss(0, 0.05))
        end = 60 if stops and i % 3 == 1 else STEPS
        state = "FAILED" if i >= num - failed else "COMPLETE" if end == STEPS else "STOPPED"
        _write_trial(paths, spec, f"{names}{i:03d}", state, values, final, end, i, row_noise, draws)
    return paths


def _write_trial(
    paths: SweepPaths, spec: Any, name: str, state: str, values: dict[str, Any], final: float, end: int, place: int,
    row_noise: list[float], draws: random.Random,
) -> None:  # fmt: skip
    trial, config = paths.trial(name), spec.trial_config(values)
    points = []
    for step in range(EVERY, end + 1, EVERY):
        left = LEARNING * (phi(step, values) - phi(STEPS, values))
        loss = final * math.exp(left + draws.gauss(0, 0.003))
        measured = {"eval/loss": loss, "eval/token_accuracy": math.exp(-loss)}
        points.append(MetricPoint(step=step, tokens=100 * step, time_s=step / 10, values=measured))
    last = points[-1]
    start = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=10 * (place // 2))
    is_failed = state == "FAILED"
    best = BestPoint(value=last.values["eval/loss"], step=last.step, values=last.values, adapter=f"adapters/step-{end}")
    stopped = f"forecast: too slow, loss {best.value:.3g} at step {end}" if state == "STOPPED" else None
    result = TrialResult(
        trial_id=name, state=TrialState(state), config=config, metric="eval/loss", mode="min",
        best=None if is_failed else best, step=end, total_steps=STEPS, tokens=100 * end, tokens_per_second=1e3 + place,
        peak_memory_gib=1.5, seconds=end / 10, gpu_seconds=end / 20, device="NVIDIA H200", worker=f"host:{place % 2}",
        started=start.isoformat(), ended=(start + timedelta(seconds=end / 10)).isoformat(), stopped=stopped,
        error=f"loss is NaN {HTML} {SCRIPT}" if is_failed else None, failure="diverged" if is_failed else None,
        warnings=[f"a tracker failed: {HTML}"] if place == 0 else [], applied={"num_trainable_parameters": 1000},
    )  # fmt: skip
    write_record(trial.config, config)
    write_record(trial.result, result)
    write_atomic(trial.metrics, "".join(point.model_dump_json() + "\n" for point in points))
    if stopped:
        append_decision(paths, Decision(trial_id=name, step=end, action="stopped", why=stopped))
    if not is_failed:
        adapter = trial.adapter(end)
        adapter.mkdir(parents=True)
        for file in REQUIRED:
            (adapter / file).touch()
        losses = [10 * best.value * math.exp(noise) for noise in row_noise]
        scores = RowScores(losses=losses, hits=[5] * ROWS, tokens=[10] * ROWS)
        write_atomic(adapter / SCORES, scores.model_dump_json())


def plant_repeats(paths: SweepPaths, num: int, worse: str, factor: float = 1.5, **how: Any) -> None:
    """Write a second run of each trial of a sweep without stops, with the same values; that of `worse` is worse.

    Args:
        paths: a sweep planted with the same `num` and `how`.
        num: number of trials.
        worse: the trial whose second run has a loss larger by `factor`.
        factor: ratio of that loss to the one of the first run.
        how: further arguments of `plant`.
    """
    again = plant(paths.repeats, num, stops=False, **how)
    trial = again.trial(worse)
    result = read_record(TrialResult, trial.result)
    assert result.best is not None
    value = factor * result.best.value
    best = result.best.model_copy(update={"value": value, "values": result.best.values | {"eval/loss": value}})
    write_record(trial.result, result.model_copy(update={"best": best}))
    file = trial.root / best.adapter / SCORES
    scores = RowScores.model_validate_json(file.read_text())
    raised = scores.model_copy(update={"losses": [factor * loss for loss in scores.losses]})
    write_atomic(file, raised.model_dump_json())
