"""The workers of a sweep: how many, how large, and how many trials at a time in each."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from orchestrator.data import PreparedData
from orchestrator.errors import OrchestratorError, RequestError, SweepError
from orchestrator.record import SweepPaths
from orchestrator.spec import SweepSpec
from orchestrator.storage import storage_fault
from orchestrator.sweep.workers.placement import PlacementNotice
from orchestrator.sweep.workers.worker import Worker
from orchestrator.sweep.workers.worker_client import Workers
from orchestrator.training.fast.warmup import precompile
from orchestrator.words import counted

RELAY_CPUS = 0.001
"""Of a core, for each relay: Tune refuses zero."""

_CPUS_FOR_RELAYS = 0.1
"""Of a core, that each worker leaves free."""


@dataclass(frozen=True)
class FleetPlan:
    """What to start."""

    num_workers: int
    gpus: float
    """Of each worker."""
    cpus: int
    """Of each worker."""
    slots: int
    """Trials at a time in each, as far as memory allows."""
    is_fixed: bool
    """Whether memory has no say in it."""
    why: str
    """Why so many."""


def plan_fleet(spec: SweepSpec, address: str | None) -> FleetPlan:
    """Choose the workers by what the cluster has, or may start.

    Raises:
        RequestError: `auto` on a cluster that has no GPU now (it may be about to start some: training a night long on
            CPUs is nothing to guess at), what needs a GPU where there is none, or more than a machine that cannot grow
            has, where Ray would wait for ever.
    """
    resources, there = spec.resources, ray.cluster_resources()
    num_gpus, num_cpus = there.get("GPU", 0), there.get("CPU", 0)
    whole = resources.gpus_per_trial
    if whole == "auto":
        whole = 1 if num_gpus >= 1 else 0
        if address is not None and not whole:
            raise RequestError(
                f"resources.gpus_per_trial is auto, but the cluster at {address} has no GPU at this moment",
                "Say resources.gpus_per_trial=1 (GPU workers will be started and waited for) or =0 (train on CPUs).",
            )
    if whole == 0 and spec.search.budget.gpu_hours is not None:
        raise RequestError(
            "search.budget.gpu_hours would never be spent: this machine has no GPU",
            "Give search.budget.wall_clock_hours or tokens.",
        )
    if whole == 0 and (reason := spec.cpu_unsupported_reason()):
        raise RequestError(f"{reason}, and this machine has none")
    if address is None and (whole > num_gpus or resources.cpus_per_trial > num_cpus):
        raise RequestError(
            f"a worker takes {whole} GPUs, {resources.cpus_per_trial} cores; this machine has {num_gpus:g} and "
            f"{num_cpus:g}",
            "Change resources.gpus_per_trial (auto takes what there is) or cpus_per_trial, or give --address.",
        )
    at_once, asked = _at_once(spec), resources.trials_per_gpu
    # SFTTrainer's own loop cannot share a process: there trials that share a GPU have one each.
    is_alone = "training.engine" not in spec.search.space | spec.search.tied and spec.training.engine == "trl"
    processes = asked if is_alone and whole == 1 and asked != "auto" else 1
    room = _room(whole, resources.cpus_per_trial, processes) or at_once  # a cluster that is yet to grow
    num_workers, slots = _spread(at_once, "auto" if is_alone else asked, room)
    if is_alone:
        slots, why = 1, "training.engine trl has a process for each trial"
    elif whole > 1:
        slots, why = 1, f"a trial takes {whole} GPUs"
    elif asked != "auto":
        why = f"resources.trials_per_gpu is {asked}"
    elif slots == 1:
        why = "there are no more trials at a time than workers"
    else:
        why = f"{at_once} trials at a time share {counted(num_workers, 'worker')}"
    if at_once < spec.search.total_trials:
        why += f"; of {spec.search.total_trials} trials resources.max_concurrent lets {at_once} run at a time"
    is_fixed = slots == 1 or asked != "auto"
    return FleetPlan(num_workers, whole / processes, resources.cpus_per_trial, slots, is_fixed, why)


@contextmanager
def compiling_early(spec: SweepSpec, address: str | None) -> Iterator[None]:
    """Where Ray is to be started on this machine, begin before that to compile what its workers need: see `ahead`.

    They compile whatever turns out to be another.
    """
    resources, here = spec.resources, address is None and not ray.is_initialized()
    gpus, whole = _gpus_here() if here else 0, resources.gpus_per_trial
    if gpus and whole != 0:
        room = max(1, min(gpus, (os.cpu_count() or 1) // resources.cpus_per_trial))
        _, slots = _spread(_at_once(spec), resources.trials_per_gpu, room)
        precompile.start(spec.corners_on_base(), slots if whole in ("auto", 1) else 1)
    try:
        yield
    finally:
        precompile.stop()


class Fleet:
    """Workers that have been started, for a driver."""

    def __init__(self, layout: FleetPlan, spec: SweepSpec) -> None:
        """Start them; they import what is heavy by themselves."""
        actor = ray.remote(
            num_gpus=layout.gpus,
            num_cpus=layout.cpus - _CPUS_FOR_RELAYS,
            max_restarts=-1,
            max_concurrency=2 * layout.slots + 16,  # one thread waits for each trial's events
            scheduling_strategy="SPREAD",
        )(Worker)
        self._layout = layout
        self._notice: PlacementNotice | None = None
        self._handles = [
            actor.remote(spec, layout.slots, layout.is_fixed, layout.gpus) for _ in range(layout.num_workers)
        ]

    def open(self, data: PreparedData, paths: SweepPaths, say: Callable[[str], None]) -> tuple[Workers, int, str]:
        """Let the workers load the base.

        Args:
            data: tokenized rows.
            paths: of the sweep.
            say: takes a sentence on what is waited for, now and later, where the cluster has no place for a worker.

        Returns:
            The workers for relays, the trials at a time in all of them together, and a sentence on what was chosen.

        Raises:
            OrchestratorError: what keeps every worker from it.
        """
        layout = self._layout
        workers = Workers(
            handles=self._handles,
            ready=[handle.__ray_ready__.remote() for handle in self._handles],
            data=ray.put(data),
            logs=paths.workers,
        )
        self._notice = PlacementNotice(workers.ready, layout.gpus, layout.cpus, say)
        if layout.is_fixed:
            slots, why = layout.slots, ""
            for handle in self._handles:
                workers.open(handle)
        else:
            slots, why = _first_answer([workers.open(handle) for handle in self._handles])
        device = f"{layout.gpus:g} GPU" if layout.gpus else f"{counted(layout.cpus, 'CPU core')}"
        said = (
            f"{counted(layout.num_workers, 'worker')} of {device}, {counted(slots, 'trial')} at a time in each: "
            f"{layout.why}{f'; {why}' if why else ''}"
        )
        return workers, slots * layout.num_workers, said

    def end(self) -> None:
        """End them."""
        if self._notice is not None:
            self._notice.stop()
        for handle in self._handles:
            ray.kill(handle)


@contextmanager
def start_fleet(spec: SweepSpec, address: str | None) -> Iterator[Fleet]:
    """Workers for the time of a sweep.

    Raises:
        RequestError: see `plan_fleet`.
    """
    fleet = Fleet(plan_fleet(spec, address), spec)
    try:
        yield fleet
    finally:
        fleet.end()


def _at_once(spec: SweepSpec) -> int:
    """Trials that may run at a time."""
    return min(spec.search.total_trials, spec.resources.max_concurrent or spec.search.total_trials)


def _spread(at_once: int, asked: int | Literal["auto"], room: int) -> tuple[int, int]:
    """Workers, and trials at a time in each: at most as many as are asked for."""
    num_workers = min(room, at_once if asked == "auto" else math.ceil(at_once / asked))
    share = math.ceil(at_once / num_workers)
    return num_workers, share if asked == "auto" else min(asked, share)


def _gpus_here() -> int:
    """GPUs of this machine that this process may use, as Ray counts them; none of torch's CUDA is started for it."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager as Nvidia

    visible = Nvidia.get_current_process_visible_accelerator_ids()
    there: int = Nvidia.get_current_node_num_accelerators()
    return there if visible is None else min(there, len(visible))


def _room(gpus: int, cpus: int, processes: int) -> int:
    """Workers that the cluster has room for, or may have when its autoscaler has started all it may."""
    now = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        of_cpus = int(has.get("CPU", 0)) // cpus
        now += min(int(has.get("GPU", 0)) // gpus * processes, of_cpus) if gpus else of_cpus
    most = _autoscaler_resources()
    kind, each = ("GPU", gpus) if gpus else ("CPU", cpus)
    return max(now, int(most.get(kind, 0)) // each * (processes if gpus else 1))


def _autoscaler_resources() -> dict[str, int]:
    """What the nodes of a cluster have together when its autoscaler, if it has one, has started all it may."""
    return ray._private.state.state.get_max_resources_from_cluster_config() or {}


def _first_answer(answers: list[Any]) -> tuple[int, str]:
    """Slots of the worker that is open first: the others are like it, or wait for their place in the cluster."""
    fault: Exception | None = None
    while answers:
        (done,), answers = ray.wait(answers)
        try:
            slots: tuple[int, str] = ray.get(done)
        except RayError as error:
            fault = error
        else:
            return slots
    if isinstance(fault, RayTaskError) and (isinstance(fault.cause, OrchestratorError) or storage_fault(fault.cause)):
        raise fault.cause
    raise SweepError(f"no worker could be started: {str(fault).strip().splitlines()[-1]}") from fault
