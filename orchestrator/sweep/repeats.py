"""Run the finalists of a sweep again with other seeds: a small sweep of its own, in the folder `repeats`."""

import os
import shutil
from typing import Any

from orchestrator.deploy import FinishedSweep
from orchestrator.record import SweepInfo, SweepPaths, SweepRecord, TrialResult, TrialState, read_sweep, write_record
from orchestrator.record.files import building_beside
from orchestrator.spec import SweepSpec
from orchestrator.spec.search import SEED

MAX_FINALISTS = 4


def begin_repeats(record: SweepRecord) -> SweepRecord | None:
    """Return the record of the repeats, made now or by an earlier driver; None if no trial has run to its end.

    Repeats of other finalists, from before the sweep was given more trials, are replaced.

    Raises:
        RecordError: no trial of the sweep has finished with an adapter.
    """
    trials = finalists(record)
    if not trials:
        return None
    spec = repeats_of(record.info.spec, trials)
    paths = SweepPaths(record.paths.repeats)
    if paths.sweep.is_file():
        before = read_sweep(paths.root)
        if before.info.spec == spec:
            return before
        shutil.rmtree(paths.root)
    info = record.info.model_copy(
        update={"name": paths.name, "spec": spec, "changes": [], "source": None, "prior_sweeps": []}
    )
    with building_beside(paths.root) as building:
        inside = SweepPaths(building)
        inside.data.symlink_to(os.path.relpath(record.paths.data, paths.root))
        write_record(inside.sweep, SweepInfo.model_validate(info.model_dump()))
        building.rename(paths.root)
    return read_sweep(paths.root)


def finalists(record: SweepRecord) -> list[TrialResult]:
    """Return the best trial and those that cannot be told apart from it on the held-out rows, best first.

    There are at least two, where two trials have scores of these rows: the lead over the second may be that of a seed.
    A trial that was stopped is no finalist: its run of fewer steps says nothing about whole runs with other seeds.

    Raises:
        RecordError: no trial of the sweep has finished with an adapter.
    """
    choice = FinishedSweep(record, uses_repeats=False).best(strict=True).recommendation
    tied = [choice.leader, *(rival.candidate for rival in choice.tied)]
    others = [rival.candidate for rival in choice.rivals if not rival.is_tied]
    ranked = [each.trial for each in (*tied, *others) if each.trial.state == TrialState.COMPLETE]
    num_tied = sum(each.trial.state == TrialState.COMPLETE for each in tied)
    return ranked[: min(max(num_tied, 2), MAX_FINALISTS)]


def repeats_of(spec: SweepSpec, trials: list[TrialResult]) -> SweepSpec:
    """Return the experiment that runs these trials again with other seeds. No scheduler stops them, nor a budget."""
    document: dict[str, Any] = spec.model_dump(mode="json")
    first_seed, search = spec.training.seed, document["search"]
    seeds = [first_seed + i for i in range(1, spec.search.repeats)]
    space = {
        path: {"choice" if kind == "grid" else kind: values for kind, values in axis.items()}
        for path, axis in search["space"].items()
    }
    points = [
        {path: value for path, value in trial.config.varied.items() if path in space} | {SEED: seed}
        for trial in trials
        for seed in seeds
    ]
    kept = {name: search[name] for name in ("tied", "metric", "mode")}
    document["search"] = kept | {
        "algorithm": "random",
        "space": space | {SEED: {"choice": seeds}},
        "first": points,
        "num_trials": len(points),
    }
    document["scheduler"] = {"kind": "none"}
    document["tracking"] = {"tensorboard": False, "wandb": {"mode": "disabled"}}
    return SweepSpec.model_validate(document)
