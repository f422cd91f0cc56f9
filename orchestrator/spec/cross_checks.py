"""Rules between sections: which searcher, scheduler, search space and training length go together.

Each combination that makes no sense is refused, with the reason.
"""

from collections.abc import Callable, Sequence
from typing import assert_never

from orchestrator.spec.search import SearchSection
from orchestrator.spec.sections import ResourcesSection, SchedulerSection, TrainingSection, TrialConfig
from orchestrator.spec.sections.scheduler import (
    BohbScheduler,
    Brackets,
    ForecastScheduler,
    HyperBandScheduler,
    NoScheduler,
    Pb2Scheduler,
    PbtScheduler,
    Population,
    Rungs,
)

MUTABLE = (
    "training.learning_rate",
    "training.weight_decay",
    "training.max_grad_norm",
    "lora.dropout",
    "lora.rank",
    "lora.alpha",
)
"""Fields that may change during a trial: both engines read them again when they continue from a checkpoint. Where rank
or alpha change, the adapter and the optimizer's moments are resized (`training.model.rank_change`)."""

_PB2_KINDS = ("uniform", "loguniform", "randint", "lograndint")
"""Kinds of axes that PB2 can search."""

_WHY_NOT_MUTABLE = {
    "lora.target_modules": "other layers would be adapted, which have learned nothing yet",
    "lora.bias": "other weights would train, for which the optimizer has no state",
    "training.batch_size": "the checkpoint counts its position in the data in batches",
    "training.accumulation": "the checkpoint counts its position in the data in batches",
    "training.steps": "the checkpoint's learning rate schedule depends on the number of steps",
    "training.epochs": "the checkpoint's learning rate schedule depends on the number of steps",
    "training.schedule": "the checkpoint holds the state of the schedule",
    "training.warmup": "the warmup is over at the checkpoint",
    "training.optimizer": "the checkpoint holds the state of another optimizer",
    "training.seed": "the order of rows would change, and some rows would be seen twice",
}


def check_sections_together(
    search: SearchSection, scheduler: SchedulerSection, training: TrainingSection, resources: ResourcesSection
) -> None:
    """Refuse sections that do not go together.

    Raises:
        ValueError: names the fields, their values and the reason.
    """
    _searcher_fits(search, scheduler)
    if search.budget.gpu_hours is not None and resources.gpus_per_trial == 0:
        raise ValueError("search.budget.gpu_hours would never be spent: resources.gpus_per_trial is 0")
    _strategy_fits(search, training, resources)
    if search.stop.is_set and isinstance(scheduler, Brackets | Population):
        raise ValueError(
            f"search.stop ends the drawing of trials, but scheduler.kind {scheduler.kind} compares trials that begin "
            "together; use search.budget, or another scheduler"
        )
    if isinstance(scheduler, Rungs):
        _rungs_meet_evaluations(search, scheduler, training)
        if isinstance(scheduler, Brackets):
            _brackets_have_rungs(search, scheduler, training)
    elif isinstance(scheduler, Population):
        _population_can_change(search, scheduler)
        _interval_meets_evaluations(scheduler, training)
    elif not isinstance(scheduler, NoScheduler | ForecastScheduler):
        assert_never(scheduler)
    if isinstance(scheduler, Brackets | Population):
        _checkpoints_meet_evaluations(search, scheduler, training)


def check_trials(
    search: SearchSection,
    scheduler: SchedulerSection,
    resources: ResourcesSection,
    training: TrainingSection,
    samples: Callable[[], Sequence[TrialConfig]],
) -> None:
    """Refuse trials that need a GPU where there is none, a setting that no trial can use, and repeated points.

    Args:
        search, scheduler, resources, training: sections of the experiment.
        samples: returns trials that represent all others; called only if it is needed.

    Raises:
        ValueError: names the field and the reason.
    """
    if training.dequantize != "auto" or _varies(search, "training.dequantize"):
        asked = [config for config in samples() if config.training.dequantize != "auto"]
        if asked and all(idle := [config.dequantize_unused_reason() for config in asked]):
            raise ValueError(f"training.dequantize is {asked[0].training.dequantize}, but {idle[0]}; leave it out")
    if resources.gpus_per_trial == 0:
        for config in samples():
            if reason := config.cpu_unsupported_reason():
                raise ValueError(f"{reason}, and resources.gpus_per_trial is 0")
    if isinstance(scheduler, Population) and {"lora.rank", "lora.alpha"} & {*search.space, *search.tied}:
        _ranks_can_change(scheduler, samples())
    num_trials, num_points = search.num_trials, search.num_points
    # Members of a population may begin at the same point.
    if num_trials is not None and search.space and num_trials > num_points and not isinstance(scheduler, Population):
        raise ValueError(
            f"search.num_trials: {num_trials} trials would repeat points, because the space has {num_points:.0f}; "
            f"give at most {num_points:.0f}, or algorithm grid, which tries each point once"
        )


def _ranks_can_change(scheduler: Population, configs: Sequence[TrialConfig]) -> None:
    """Refuse to change rank or alpha during a trial where more than LoRA's matrices and AdamW's moments depends on
    them."""
    for lora, optimizer in ((config.lora, config.training.optimizer) for config in configs):
        reason = None
        if "adamw" not in optimizer or "8bit" in optimizer:
            reason = f"training.optimizer is {optimizer}, and only AdamW's moments in 32 bits can be resized"
        elif lora.dora:
            reason = "lora.dora: the magnitudes of the adapted weights depend on the update"
        elif lora.starts_from_base:
            reason = f"lora.init {lora.init}: the first update is subtracted from the base"
        elif lora.names_experts:
            reason = "lora.target_modules names experts, whose adapters cannot be resized"
        if reason is not None:
            raise ValueError(
                f"scheduler.kind {scheduler.kind} cannot change lora.rank or lora.alpha during a trial here: {reason}; "
                "take them out of search, or change that"
            )


def _strategy_fits(search: SearchSection, training: TrainingSection, resources: ResourcesSection) -> None:
    """Refuse a strategy for several GPUs that the engine does not have."""
    engine = training.engine
    if resources.strategy == "shard":
        if engine == "trl" or _varies(search, "training.engine"):
            raise ValueError("resources.strategy shard needs the fast engine; set training.engine to fast or auto")
        if searched := [name for name in {*search.space, *search.tied} if name.startswith("base.")]:
            raise ValueError(
                f"resources.strategy shard holds one base in pieces, but {min(searched)} is searched; use pipeline, or "
                "a sweep for each base"
            )
    if resources.strategy == "pipeline" and engine == "fast":
        raise ValueError("resources.strategy pipeline spreads a base over devices, which training.engine fast refuses")


def _searcher_fits(search: SearchSection, scheduler: SchedulerSection) -> None:
    algorithm, kind = search.algorithm, scheduler.kind
    if isinstance(scheduler, BohbScheduler) != (algorithm == "bohb"):
        raise ValueError(
            f"search.algorithm bohb and scheduler.kind bohb go only with each other: the searcher learns from what the "
            f"scheduler measures at its rungs (got {algorithm} and {kind})"
        )
    if isinstance(scheduler, HyperBandScheduler | Population) and algorithm not in ("random", "grid"):
        reason = (
            "the trials of a bracket are created before any of them has reported"
            if kind == "hyperband"
            else "its trials all exist from the start, and it finds new values itself"
        )
        raise ValueError(
            f"scheduler.kind {kind} does not go with search.algorithm {algorithm}: {reason}; use random or grid"
            + (", or bohb for both" if kind == "hyperband" else "")
        )


def _varies(search: SearchSection, path: str) -> bool:
    return path in search.space or path in search.tied


def first_rung_steps(scheduler: SchedulerSection, training: TrainingSection) -> int:
    """Return the first step at which a scheduler that counts steps may stop a trial."""
    given = scheduler.grace_steps if isinstance(scheduler, Rungs) else None
    return given or training.eval_steps


def perturbation_steps(scheduler: SchedulerSection, training: TrainingSection) -> int:
    """Return the number of steps between two decisions of PBT or PB2 about a trial, if they count steps."""
    given = scheduler.interval_steps if isinstance(scheduler, Population) else None
    return given or training.eval_steps


def _rungs_meet_evaluations(search: SearchSection, scheduler: Rungs, training: TrainingSection) -> None:
    if _varies(search, "training.eval_steps"):
        raise ValueError(f"training.eval_steps cannot be searched under scheduler {scheduler.kind}")
    grace, every = first_rung_steps(scheduler, training), training.eval_steps
    if scheduler.counts == "step" and grace % every:
        raise ValueError(
            f"scheduler.grace_steps ({grace}) must be a multiple of training.eval_steps ({every}): "
            "trials are compared at equal steps"
        )


def _brackets_have_rungs(search: SearchSection, scheduler: Brackets, training: TrainingSection) -> None:
    if scheduler.counts == "tokens":
        unit, grace, longest = "tokens", scheduler.grace_tokens or 0, scheduler.max_tokens or 0
    else:
        unit, grace = "steps", first_rung_steps(scheduler, training)
        if scheduler.max_steps is None and (training.steps is None or _varies(search, "training.steps")):
            raise ValueError(
                f"scheduler.kind {scheduler.kind} counts its rungs down from a whole trial: give scheduler.max_steps, "
                "or a training.steps that is not searched"
            )
        longest = scheduler.max_steps or training.steps or 0
    if longest < grace * scheduler.reduction_factor:
        raise ValueError(
            f"scheduler.kind {scheduler.kind} would have no rung: a whole trial of {longest} {unit} is shorter than "
            f"grace_{unit} ({grace}) times reduction_factor ({scheduler.reduction_factor})"
        )


def _checkpoints_meet_evaluations(
    search: SearchSection, scheduler: Brackets | Population, training: TrainingSection
) -> None:
    """A paused or cloned trial continues from the checkpoint of the evaluation at which the scheduler decided."""
    save, every, is_varied = training.save_steps, training.eval_steps, _varies(search, "training.save_steps")
    if is_varied or (save is not None and every % save):
        raise ValueError(
            f"training.save_steps ({'searched' if is_varied else save}) must divide training.eval_steps ({every}) "
            f"under scheduler {scheduler.kind}: trials continue from the checkpoint of an evaluation; leave it out"
        )


def _interval_meets_evaluations(scheduler: Population, training: TrainingSection) -> None:
    if scheduler.counts == "tokens":
        return
    interval, every = perturbation_steps(scheduler, training), training.eval_steps
    if interval % every:
        raise ValueError(
            f"scheduler.interval_steps ({interval}) must be a multiple of training.eval_steps ({every}): "
            "trials are compared at their evaluations"
        )


def _explores(search: SearchSection, scheduler: PbtScheduler) -> bool:
    """Whether PBT can reach another value on any axis."""
    moves = scheduler.resample_probability > 0 or set(scheduler.factors) != {1.0}
    listed = [axis.listed() for axis in search.space.values()]
    return any(moves if values is None else len(values) > 1 for values in listed)


def _population_can_change(search: SearchSection, scheduler: Population) -> None:
    kind = scheduler.kind
    if search.repeats > 1:
        raise ValueError(
            f"search.repeats runs finalists again with the values that they began with, but scheduler.kind {kind} "
            "changes values during a trial; leave repeats out"
        )
    if not search.space:
        raise ValueError(f"scheduler.kind {kind} changes searched values, and search.space has none")
    if isinstance(scheduler, PbtScheduler) and not _explores(search, scheduler):
        raise ValueError(
            "scheduler.kind pbt would try no other value: listed axes need two values, ranges need scheduler.factors "
            "other than 1 or a resample_probability above 0"
        )
    if search.total_trials < 2:
        raise ValueError(f"scheduler.kind {kind} needs two or more trials: each learns from the others")
    for path in (*search.space, *search.tied):
        if path not in MUTABLE:
            why = _WHY_NOT_MUTABLE.get(path, "it cannot change between a checkpoint and the next step")
            raise ValueError(
                f"scheduler.kind {kind} cannot change {path} during a trial: {why}. It changes {', '.join(MUTABLE)}; "
                f"take {path} out of search"
            )
    for path, axis in search.space.items():
        if axis.when:
            raise ValueError(
                f"scheduler.kind {kind} changes values of all trials: search.space.{path} may have no `when`"
            )
        if isinstance(scheduler, Pb2Scheduler) and axis.kind not in _PB2_KINDS:
            raise ValueError(
                f"scheduler.kind pb2 draws any value between two ends, but search.space.{path} is {axis.kind}; use "
                "uniform or loguniform (randint or lograndint for whole numbers), or scheduler pbt"
            )
