"""What goes with what: searcher, scheduler, axes and time. Each pair that makes no sense is refused with the reason."""

from typing import TYPE_CHECKING

from orchestrator.spec.sections.scheduler import (
    BohbScheduler,
    Brackets,
    HyperBandScheduler,
    Pb2Scheduler,
    PbtScheduler,
    Population,
    Rungs,
)

if TYPE_CHECKING:
    from orchestrator.spec.sweep_spec import SweepSpec

MUTABLE = ("training.learning_rate", "training.weight_decay", "training.max_grad_norm", "lora.dropout")
"""What either engine takes from the configuration when it goes on from a checkpoint: it may change in mid-trial."""

_WHY_NOT_MUTABLE = {
    "lora.rank": "the adapter's matrices, and the optimizer's state, have another shape",
    "lora.target_modules": "other layers would be adapted, which have learned nothing",
    "lora.bias": "other weights would train, for which the optimizer has no state",
    "lora.alpha": "it scales what has been learned: the adapter would be another one at once",
    "training.batch_size": "the checkpoint's place in the data is counted in batches",
    "training.accumulation": "the checkpoint's place in the data is counted in batches",
    "training.steps": "the checkpoint's schedule is one of so many steps",
    "training.epochs": "the checkpoint's schedule is one of so many steps",
    "training.schedule": "the checkpoint holds the schedule's state",
    "training.warmup": "the checkpoint's schedule is behind it",
    "training.optimizer": "the checkpoint holds the state of another optimizer",
    "training.seed": "the order of rows would be another one, and some would be seen twice",
}


def check_pairs(spec: "SweepSpec") -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: with the fields, their values and the reason.
    """
    _searcher_fits(spec)
    _budget_can_be_spent(spec)
    scheduler = spec.scheduler
    if isinstance(scheduler, Rungs):
        _rungs_meet_evaluations(spec, scheduler)
    if isinstance(scheduler, Brackets):
        _brackets_have_rungs(spec, scheduler)
    if isinstance(scheduler, Population):
        _population_can_change(spec, scheduler)
        _interval_meets_evaluations(spec, scheduler)
    if isinstance(scheduler, Brackets | Population):
        _goes_on_from_evaluations(spec)


def _searcher_fits(spec: "SweepSpec") -> None:
    algorithm, kind = spec.search.algorithm, spec.scheduler.kind
    if isinstance(spec.scheduler, BohbScheduler) != (algorithm == "bohb"):
        raise ValueError(
            f"search.algorithm bohb and scheduler.kind bohb go only with each other: the one draws by what the other "
            f"has measured at its rungs (got {algorithm} and {kind})"
        )
    if isinstance(spec.scheduler, HyperBandScheduler | Population) and algorithm not in ("random", "grid"):
        reason = (
            "the trials of its brackets are there before any of them has reported"
            if kind == "hyperband"
            else "its trials are there from the start, and it finds new values itself"
        )
        raise ValueError(
            f"scheduler.kind {kind} does not go with search.algorithm {algorithm}: {reason}; use random or grid"
            + (", or bohb for both" if kind == "hyperband" else "")
        )


def _budget_can_be_spent(spec: "SweepSpec") -> None:
    if spec.search.budget.gpu_hours is not None and spec.resources.gpus_per_trial == 0:
        raise ValueError("search.budget.gpu_hours would never be spent: resources.gpus_per_trial is 0")


def check_trials(spec: "SweepSpec") -> None:
    """Refuse trials that need a GPU where there is none, a setting that none of them can use, and repeated points.

    Raises:
        ValueError: with the field and the reason.
    """
    if spec.training.dequantise != "auto" or _varies(spec, "training.dequantise"):
        asked = [config for config in spec.samples() if config.training.dequantise != "auto"]
        if asked and all(idle := [config.why_not_dequantised() for config in asked]):
            raise ValueError(f"training.dequantise is {asked[0].training.dequantise}, but {idle[0]}; leave it out")
    if spec.resources.gpus_per_trial == 0 and (reason := spec.why_not_on_cpu()):
        raise ValueError(f"{reason}, and resources.gpus_per_trial is 0")
    _trials_can_differ(spec)


def _trials_can_differ(spec: "SweepSpec") -> None:
    """Refuse more trials than the space has points. Members of a population may begin at the same point."""
    search = spec.search
    asked, there = search.num_trials, search.num_points
    if asked is not None and search.space and asked > there and not isinstance(spec.scheduler, Population):
        raise ValueError(
            f"search.num_trials: {asked} trials would repeat points, for the space has {there:.0f}; "
            f"give at most {there:.0f}, or algorithm grid, which tries each point once"
        )


def _varies(spec: "SweepSpec", path: str) -> bool:
    return path in spec.search.space or path in spec.search.tied


def _rungs_meet_evaluations(spec: "SweepSpec", scheduler: Rungs) -> None:
    if _varies(spec, "training.eval_steps"):
        raise ValueError(f"training.eval_steps cannot be searched under scheduler {scheduler.kind}")
    grace, every = spec.grace_steps, spec.training.eval_steps
    if scheduler.counts == "step" and grace % every:
        raise ValueError(
            f"scheduler.grace_steps ({grace}) must be a multiple of training.eval_steps ({every}): "
            "trials are compared at equal steps"
        )


def _brackets_have_rungs(spec: "SweepSpec", scheduler: Brackets) -> None:
    if scheduler.counts == "tokens":
        unit, grace, longest = "tokens", scheduler.grace_tokens or 0, scheduler.max_tokens or 0
    else:
        unit, grace = "steps", spec.grace_steps
        if scheduler.max_steps is None and (spec.training.steps is None or _varies(spec, "training.steps")):
            raise ValueError(
                f"scheduler.kind {scheduler.kind} counts its rungs down from a whole trial: give scheduler.max_steps, "
                "or a training.steps that is not searched"
            )
        longest = scheduler.max_steps or spec.training.steps or 0
    if longest < grace * scheduler.reduction_factor:
        raise ValueError(
            f"scheduler.kind {scheduler.kind} would have no rung: a whole trial of {longest} {unit} is shorter than "
            f"grace_{unit} ({grace}) times reduction_factor ({scheduler.reduction_factor})"
        )


def _goes_on_from_evaluations(spec: "SweepSpec") -> None:
    """A trial that waits, or is cloned, goes on from the checkpoint of the evaluation at which that was decided."""
    save, every = spec.training.save_steps, spec.training.eval_steps
    if _varies(spec, "training.save_steps") or (save is not None and every % save):
        raise ValueError(
            f"training.save_steps ({'searched' if _varies(spec, 'training.save_steps') else save}) must divide "
            f"training.eval_steps ({every}) under scheduler {spec.scheduler.kind}: trials go on from the checkpoint of "
            "an evaluation; leave it out"
        )


def _interval_meets_evaluations(spec: "SweepSpec", scheduler: Population) -> None:
    if scheduler.counts == "tokens":
        return
    interval, every = spec.interval_steps, spec.training.eval_steps
    if interval % every:
        raise ValueError(
            f"scheduler.interval_steps ({interval}) must be a multiple of training.eval_steps ({every}): "
            "trials are compared at their evaluations"
        )


def _explores(spec: "SweepSpec", scheduler: PbtScheduler) -> bool:
    """Whether PBT can come to another value of any axis."""
    moves = scheduler.resample_probability > 0 or set(scheduler.factors) != {1.0}
    listed = [axis.listed() for axis in spec.search.space.values()]
    return any(moves if values is None else len(values) > 1 for values in listed)


def _population_can_change(spec: "SweepSpec", scheduler: Population) -> None:
    kind = scheduler.kind
    if not spec.search.space:
        raise ValueError(f"scheduler.kind {kind} changes searched values, and search.space has none")
    if isinstance(scheduler, PbtScheduler) and not _explores(spec, scheduler):
        raise ValueError(
            "scheduler.kind pbt would try no other value: listed axes need two values, ranges need scheduler.factors "
            "other than 1 or a resample_probability above 0"
        )
    if spec.search.total_trials < 2:
        raise ValueError(f"scheduler.kind {kind} needs two trials or more: each learns from others")
    for path in (*spec.search.space, *spec.search.tied):
        if path not in MUTABLE:
            why = _WHY_NOT_MUTABLE.get(path, "it cannot change between a checkpoint and the next step")
            raise ValueError(
                f"scheduler.kind {kind} cannot change {path} in mid-trial: {why}. It changes {', '.join(MUTABLE)}; "
                f"take {path} out of search"
            )
    for path, axis in spec.search.space.items():
        if axis.when:
            raise ValueError(
                f"scheduler.kind {kind} changes values of all trials: search.space.{path} may have no `when`"
            )
        if isinstance(scheduler, Pb2Scheduler) and axis.kind not in ("uniform", "loguniform"):
            raise ValueError(
                f"scheduler.kind pb2 takes any value between two ends: search.space.{path} is {axis.kind}; use uniform "
                "or loguniform, or scheduler pbt"
            )
