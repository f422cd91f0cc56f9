"""Measure the winner on the test rows, in a process of its own on the cluster: the driver may have no GPU."""

import os
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from orchestrator.deploy import FinishedSweep
from orchestrator.errors import OrchestratorError
from orchestrator.record import SweepRecord, read_sweep
from orchestrator.sweep.workers.placement import kind_of_gpu


def measure_winner(record: SweepRecord, gpus: float, cpus: int) -> None:
    """Score the recommended adapter on the rows of `data.test`, unless that was done before.

    Args:
        record: the sweep's record; its workers have ended.
        gpus: GPUs of the process, possibly a fraction of one.
        cpus: its threads.

    Raises:
        OrchestratorError: the adapter cannot be scored.
    """
    if FinishedSweep(record).best().test_score is not None:
        return
    kind = kind_of_gpu(record.info.spec.resources.accelerator if gpus else None)
    task: Any = ray.remote(num_gpus=gpus, num_cpus=1, resources=kind, max_retries=0)(_score)
    try:
        ray.get(task.remote(str(record.paths.root), cpus))
    except RayTaskError as error:
        if isinstance(error.cause, OrchestratorError):
            raise error.cause from error
        raise


def _score(root: str, cpus: int) -> None:
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from a task that asked for none
    from orchestrator.deploy.scoring.winner import score_winner
    from orchestrator.training.attempt.log_file import output_to
    from orchestrator.training.model.device import use_device

    record = read_sweep(root)
    with output_to(Path(root) / "workers" / "test.log"):
        use_device(cpus)
        score_winner(record)
