"""Trials of a sweep that run again and to their end: a small sweep of its own, in a folder of the sweep."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.record import SweepInfo, SweepPaths, SweepRecord, TrialResult, read_sweep, write_info
from orchestrator.record.files import building_beside, publish
from orchestrator.spec import SweepSpec


def point_of(trial: TrialResult, spec: SweepSpec) -> dict[str, Any]:
    """Return the searched values of a trial; tied values follow from them."""
    return {path: value for path, value in trial.config.varied.items() if path in spec.search.space}


def rerun_spec(spec: SweepSpec, points: Sequence[dict[str, Any]], more_axes: dict[str, Any] | None = None) -> SweepSpec:
    """Return the experiment that runs these points. No scheduler stops them, nor a budget, and trackers are off.

    Args:
        spec: the experiment of the sweep.
        points: different points of its space, with values for `more_axes`.
        more_axes: further axes, as they are written in an experiment.
    """
    document: dict[str, Any] = spec.model_dump(mode="json")
    search = document["search"]
    space = {
        path: {"choice" if kind == "grid" else kind: values for kind, values in axis.items()}
        for path, axis in search["space"].items()
    }
    kept = {name: search[name] for name in ("tied", "metric", "mode")}
    document["search"] = kept | {
        "algorithm": "random",
        "space": space | (more_axes or {}),
        "first": list(points),
        "num_trials": len(points),
    }
    document["scheduler"] = {"kind": "none"}
    document["tracking"] = {"tensorboard": False, "wandb": {"mode": "disabled"}}
    return SweepSpec.model_validate(document)


def begin_rerun(record: SweepRecord, root: Path, spec: SweepSpec) -> SweepRecord:
    """Return the record of a sweep inside a sweep, made now or by an earlier driver. It shares the sweep's rows.

    A record of another experiment in the same folder is replaced.
    """
    paths = SweepPaths(root)
    if paths.sweep.is_file():
        before = read_sweep(root)
        if before.info.spec == spec:
            return before
        shutil.rmtree(root)
    own = {"name": paths.name, "spec": spec, "changes": [], "source": None, "prior_sweeps": []}
    info = record.info.model_copy(update=own)
    with building_beside(root) as building:
        inside = SweepPaths(building)
        inside.data.symlink_to(os.path.relpath(record.paths.data, root))
        write_info(inside, SweepInfo.model_validate(info.model_dump()))
        publish(building, root)
    return read_sweep(root)
