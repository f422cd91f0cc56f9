"""Finished trials of earlier sweeps as evidence for a new one (`sweep --warm-from`)."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from orchestrator.errors import RequestError
from orchestrator.priors.kinship import Kin
from orchestrator.rate_prior import begin_at
from orchestrator.record import SweepRecord, TrialResult, TrialState
from orchestrator.record.models import PriorSweep, PriorTrial
from orchestrator.spec import SweepSpec
from orchestrator.spec.axes import Axis
from orchestrator.spec.dotted import read_path
from orchestrator.words import counted

LEARNS: Final = ("auto", "optuna")
"""Algorithms that can use the evidence."""
ALIKE: Final = ("lora.rslora", "lora.dora", "lora.alpha", "training.optimizer")
"""Fields in which a trial must agree with the experiment's trial of the same searched values: good rates depend on
them."""


def evidence_from(spec: SweepSpec, others: Sequence[SweepRecord]) -> list[PriorSweep]:
    """Take the finished trials of other sweeps that say something about an experiment.

    Trials that were stopped are left out: their last loss is not known.

    Raises:
        RequestError: the search cannot use them, or a sweep differs in its metric, its base or its data, or has no
            trial that fits.
    """
    search = spec.search
    if others and (search.algorithm not in LEARNS or not search.space):
        what = f"algorithm {search.algorithm} does not learn from results" if search.space else "nothing is searched"
        raise RequestError(
            f"--warm-from: {what}, so it cannot use earlier trials",
            "Set search.algorithm: auto or optuna with a space, or leave --warm-from out.",
        )
    different = {other.paths.root.resolve(): other for other in others}
    return [_evidence(spec, other) for other in different.values()]


def _evidence(spec: SweepSpec, other: SweepRecord) -> PriorSweep:
    if (reason := _why_unlike(spec, other)) is not None:
        raise RequestError(f"--warm-from {other.paths.root}: {reason}", "Leave this sweep out.")
    taken: list[PriorTrial] = []
    reasons: Counter[str] = Counter()
    for trial in other.trials():
        found = _point(spec, trial)
        if isinstance(found, str):
            reasons[found] += 1
        else:
            assert trial.best is not None
            taken.append(PriorTrial(trial_id=trial.trial_id, point=found, value=trial.best.value))
    left_out = [f"{counted(number, 'trial')}: {reason}" for reason, number in reasons.items()]
    if not taken:
        raise RequestError(
            f"--warm-from {other.paths.root}: none of its trials fits: {'; '.join(left_out) or 'it has none'}",
            "Leave this sweep out, or widen search.space.",
        )
    info = other.info
    return PriorSweep(name=info.name, created=info.created, base=info.spec.base.model, trials=taken, left_out=left_out)


def _why_unlike(spec: SweepSpec, other: SweepRecord) -> str | None:
    before = other.info.spec
    if before.search.metric != spec.search.metric:
        return f"its metric is {before.search.metric}, and this one {spec.search.metric}"
    here, there = Kin.of(spec), Kin.of(before)
    if here is None or there is None:
        return "the family of its base or of this one is not known, as config.json is not here or does not give it"
    return there.difference(here)


def _point(spec: SweepSpec, trial: TrialResult) -> dict[str, Any] | str:
    """Return a trial's values of the searched fields, or why it says nothing about this search."""
    if trial.state != TrialState.COMPLETE or trial.best is None or not math.isfinite(trial.best.value):
        return f"{trial.state.lower()}, without its last result" if trial.state != TrialState.COMPLETE else "no result"
    config = trial.config.model_dump(mode="json")
    point = spec.search.active(
        {path: _as_listed(axis, read_path(config, path)) for path, axis in spec.search.space.items()}
    )
    for path, value in point.items():
        if not spec.search.space[path].holds(value):
            return f"{path} {value} is not a value of this search"
    own = spec.trial_config(point).model_dump(mode="json")
    for path in ALIKE:
        if read_path(config, path) != read_path(own, path):
            return f"{path} is {read_path(config, path)} there and {read_path(own, path)} here"
    return point


def _as_listed(axis: Axis, value: Any) -> Any:
    """Return the value as the axis lists it: a configuration holds 16.0 where the axis lists 16."""
    if isinstance(value, bool):
        return value
    if not axis.is_discrete:
        return int(value) if axis.is_whole and isinstance(value, float) and value.is_integer() else value
    return next((each for each in axis.values if each == value and not isinstance(each, bool)), value)


def best_trial(sweeps: Sequence[PriorSweep], mode: str) -> PriorTrial:
    """Return the best trial of the first sweep: losses of different sweeps cannot be compared."""
    return sorted(sweeps[0].trials, key=lambda trial: trial.value if mode == "min" else -trial.value)[0]


def with_evidence(spec: SweepSpec, sweeps: Sequence[PriorSweep]) -> tuple[SweepSpec, list[str]]:
    """Begin the search of `auto` at the best earlier trial, but for what `search.prior` gives.

    Returns:
        The experiment, and what to tell the user.
    """
    if not sweeps:
        return spec, []
    said = [
        f"warm start: {counted(len(each.trials), 'finished trial')} of sweep {each.name} ({each.created[:10]}, "
        f"{each.base}) as prior evidence" + "".join(f"; left out {reason}" for reason in each.left_out)
        for each in sweeps
    ]
    if spec.search.algorithm != "auto":
        return spec, said
    return begin_at(spec, best_trial(sweeps, spec.search.resolved_mode).point | spec.search.written_prior), said
