"""Measures a few steps of a trial on this machine, by the same code that trains trials."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from orchestrator.planning.models import CornerPlan, Duration, Measured, SweepPlan
from orchestrator.planning.sweep_plan import extreme_corners
from orchestrator.record import MetricPoint, SweepPaths, TrialResult
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.training.local import run_local_trial

STEPS = 3
"""Steps of a probe."""


class _Silent:
    """A watcher that neither prints nor stops."""

    def on_step(self, step: int, total_steps: int) -> bool:
        return True

    def on_report(self, point: MetricPoint) -> bool:
        return True

    def say(self, sentence: str) -> None:
        pass


def probe_corners(spec: SweepSpec, plan: SweepPlan) -> SweepPlan:
    """Train the largest and the smallest corner for three steps each, and put what was measured into the plan.

    A corner that cannot fit into memory is not tried.

    Args:
        spec: the experiment.
        plan: made for this machine.

    Raises:
        TrialError: a trial fails, also for want of memory.
    """
    configs = [config for config in spec.samples() if config.base == spec.base]
    corners = plan.corners or _unforeseen(configs)
    chosen = extreme_corners([corner for corner in corners if corner.fits is not False])
    found = {
        corner.name: measure(spec, next(each for each in configs if each.varied == corner.values)) for corner in chosen
    }
    if plan.corners:
        corners = [each.model_copy(update={"measured": found.get(each.name)}) for each in plan.corners]
    else:  # on a CPU nothing is foreseen
        corners = [each.model_copy(update={"measured": found[each.name]}) for each in chosen]
    return retimed(plan.model_copy(update={"corners": corners}), spec.resources.cpus_per_trial)


def _unforeseen(configs: Sequence[TrialConfig]) -> list[CornerPlan]:
    """Return a corner for each rank and number of rows, the largest first."""
    found = {(corner.batch_rows, corner.rank, corner.engine): corner for corner in map(corner_alone, configs)}
    return [found[key] for key in sorted(found, reverse=True)]


def corner_alone(config: TrialConfig) -> CornerPlan:
    """Describe a trial of which nothing is foreseen."""
    training = config.training
    return CornerPlan(
        values=config.varied,
        rank=config.lora.rank,
        batch_rows=training.batch_size * training.accumulation,
        engine="trl" if training.engine == "trl" else "fast",
        reason=None,
        fits=None,
        memory_gib={},
        form=None,
        step_s=None,
    )


def retimed(plan: SweepPlan, cpus_per_trial: int) -> SweepPlan:
    """Return a plan whose time follows from the measured steps.

    Where the time is foreseen, that of training is multiplied by the geometric mean of measured over foreseen steps.
    Where it is not, the tokens of all trials are divided by the mean measured rate and the number of workers, and
    evaluations are left out.

    Args:
        plan: with measured corners.
        cpus_per_trial: cores of a worker on a CPU.
    """
    measured = [corner.measured for corner in plan.corners if corner.measured is not None]
    if not measured:
        return plan
    if plan.whole is not None:
        ratios = [each.measured.step_s / each.step_s for each in plan.corners if each.measured and each.step_s]
        factor = geometric_mean(ratios)
        stopped = None if plan.stopped is None else [_scaled(each, factor) for each in plan.stopped]
        return plan.model_copy(update={"whole": _scaled(plan.whole, factor), "stopped": stopped})
    rate = len(measured) / sum(1 / each.tokens_per_second for each in measured)
    workers = plan.num_gpus or min(plan.num_trials, max(1, (os.cpu_count() or 1) // cpus_per_trial))
    train_s = plan.tokens / rate / workers
    hours = plan.num_gpus * train_s / 3600
    whole = Duration(
        tokens=plan.tokens,
        start_s=0.0,
        train_s=round(train_s, 1),
        evaluate_s=0.0,
        total_s=round(train_s, 1),
        gpu_hours=round(hours, 4),
        price=None,
    )
    note = "the time is that of the measured steps alone: without start and evaluations"
    return plan.model_copy(update={"whole": whole, "notes": [*plan.notes, note]})


def _scaled(duration: Duration, factor: float) -> Duration:
    """Return a duration whose training takes `factor` times as long."""
    more = (factor - 1) * duration.train_s
    total = (duration.total_s + more) / duration.total_s
    return duration.model_copy(
        update={
            "train_s": round(duration.train_s + more, 1),
            "total_s": round(duration.total_s + more, 1),
            "gpu_hours": round(duration.gpu_hours * total, 4),
            "price": None if duration.price is None else round(duration.price * total, 2),
        }
    )


def measure(spec: SweepSpec, config: TrialConfig) -> Measured:
    """Train one trial for a few steps, twice: the first run compiles kernels and captures graphs, the second counts.

    Both have the same batches. Base, engine and graphs stay in this process.

    Args:
        spec: the experiment.
        config: the trial.

    Raises:
        TrialError: it fails, also for want of memory.
    """
    import torch

    short = short_trial(spec, config)
    _train(short)
    result = _train(short)
    assert result.tokens_per_second is not None
    on_gpu = torch.cuda.is_available()
    return Measured(
        device=torch.cuda.get_device_name() if on_gpu else "a CPU",
        step_s=round(result.tokens / result.tokens_per_second / result.step, 6),
        tokens_per_second=result.tokens_per_second,
        peak_gib=result.peak_memory_gib if on_gpu else None,
        engine=result.engine or "trl",
    )


def short_trial(spec: SweepSpec, config: TrialConfig) -> SweepSpec:
    """Return an experiment of one trial with a corner's values, three steps, and no tracker."""
    document: dict[str, Any] = config.model_dump(mode="json", exclude={"varied"})
    document["training"] |= {
        "steps": STEPS,
        "epochs": None,
        "eval_steps": STEPS,
        "logging_steps": 1,
        "save_steps": None,
        "schedule": "constant",
        "warmup": 0,
        "cycles": 1,
        "final_rate": 0.0,
        "decay_steps": None,
    }
    document["evaluation"] = {"metrics": []}
    document["resources"] = spec.resources.model_dump(mode="json")
    document["tracking"] = {"wandb": {"mode": "disabled"}, "tensorboard": False}
    return SweepSpec.model_validate(document)


def _train(spec: SweepSpec) -> TrialResult:
    """Run a trial in a folder that is removed, and return its result."""
    with tempfile.TemporaryDirectory() as folder:
        paths = SweepPaths(Path(folder) / "probe")
        result = run_local_trial(spec, paths, _Silent())
        assert result is not None
        return result
