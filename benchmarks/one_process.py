"""A sweep as it is commonly run: Ray Tune, a function for each trial, a process for each function.

python -m benchmarks.one_process SPEC.json FOLDER POINTS.json
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray import tune

from orchestrator.record import SweepPaths
from orchestrator.spec.load import parse_spec
from orchestrator.training.start import start_sweep


def train(point: dict[str, Any], spec_file: str, folder: str) -> None:
    from benchmarks.common import Silent
    from orchestrator.training.trial import run_trial

    spec, paths = parse_spec(json.loads(Path(spec_file).read_text())), SweepPaths(Path(folder))
    trial = paths.trial(tune.get_context().get_trial_id())
    result = run_trial(spec.trial_config(point["point"]), spec, trial, paths.data, Silent())
    assert result is not None
    assert result.best is not None
    tune.report({"loss": result.best.value})


def main(spec_file: str, folder: str, points_file: str) -> None:
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    start_sweep(parse_spec(json.loads(Path(spec_file).read_text())), SweepPaths(Path(folder)))
    trial = tune.with_parameters(train, spec_file=spec_file, folder=folder)
    resources = {"cpu": 1, "gpu": 1 if ray.cluster_resources().get("GPU") else 0}
    results = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={"point": tune.grid_search(json.loads(Path(points_file).read_text()))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(Path(folder) / "tune"), verbose=0),
    ).fit()
    if results.errors:
        raise results.errors[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
