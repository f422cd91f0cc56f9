"""A sweep as it is commonly run: Ray Tune with one function and one process for each trial.

    python -m benchmarks.one_process SPEC.json FOLDER POINTS.json

The trials are the given points, in their order; scheduler and resources are those of the experiment. The output folder
can be read like that of any sweep, except that a stopped trial has no result. Prints the seconds that the trials took.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune

from orchestrator.record import MetricPoint, SweepPaths
from orchestrator.spec.load import parse_spec
from orchestrator.sweep.schedulers.factory import make_scheduler
from orchestrator.training.start import start_sweep


class TuneReporter:
    """A watcher that reports each evaluation to Tune, except the last one, which comes with the result."""

    _total_steps = 0

    def on_step(self, step: int, total_steps: int) -> bool:
        self._total_steps = total_steps
        return True

    def on_report(self, point: MetricPoint) -> bool:
        if point.step < self._total_steps:
            tune.report({**point.values, "step": point.step})
        return True

    def say(self, sentence: str) -> None:
        print(sentence)


def train(point: dict[str, Any], spec_file: str, folder: str) -> None:
    from orchestrator.training.trial import run_trial

    spec, paths = parse_spec(json.loads(Path(spec_file).read_text())), SweepPaths(Path(folder))
    trial = paths.trial(tune.get_context().get_trial_id())
    result = run_trial(spec.trial_config(point["point"]), spec, trial, paths.data, TuneReporter())
    assert result is not None
    assert result.best is not None
    tune.report({**result.best.values, "step": result.step})


def main(spec_file: str, folder: str, points_file: str) -> None:
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    spec = parse_spec(json.loads(Path(spec_file).read_text()))
    info = start_sweep(spec, SweepPaths(Path(folder)))
    trial = tune.with_parameters(train, spec_file=spec_file, folder=folder)
    resources = {"cpu": spec.resources.cpus_per_trial, "gpu": 1 if ray.cluster_resources().get("GPU") else 0}
    began = time.monotonic()
    results = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={"point": tune.grid_search(json.loads(Path(points_file).read_text()))},
        tune_config=tune.TuneConfig(
            metric=spec.search.metric,
            mode=spec.search.resolved_mode,
            scheduler=make_scheduler(spec, info.num_rows),
            max_concurrent_trials=spec.resources.max_concurrent,
        ),
        run_config=tune.RunConfig(storage_path=str(Path(folder) / "tune"), verbose=0),
    ).fit()
    if results.errors:
        raise results.errors[0]
    print("TRIALS_S", round(time.monotonic() - began, 2), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
