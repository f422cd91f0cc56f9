"""The workers of a sweep: how many, how large, and how many trials at a time in each. Runs in the driver."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator import upstream
from orchestrator.data import PreparedData
from orchestrator.errors import OrchestratorError, RequestError, SweepError
from orchestrator.record import SweepPaths
from orchestrator.spec import SweepSpec
from orchestrator.storage import storage_fault
from orchestrator.sweep.workers.placement import KIND_PREFIX, PlacementNotice, kind_of_gpu
from orchestrator.sweep.workers.supervisor import Supervisor
from orchestrator.sweep.workers.worker import Worker
from orchestrator.sweep.workers.worker_client import Workers
from orchestrator.training.fast.shard.place import Place, new_group
from orchestrator.training.fast.warmup import precompile
from orchestrator.training.worker.spread import max_concurrent_trials, spread
from orchestrator.words import counted

if TYPE_CHECKING:
    from orchestrator.planning.fit import GpuMemory

TRAINABLE_CPUS = 0.001
"""Fraction of a CPU core for each trainable: Tune refuses zero."""

_OTHERS_S = 60.0
"""Longest wait, after one worker has loaded the base, for those that have other GPUs."""

_CPUS_LEFT_FREE = 0.1
"""Fraction of a CPU core that each worker leaves free, for trainables."""


@dataclass(frozen=True)
class FleetPlan:
    """The workers to start."""

    num_workers: int
    gpus: float
    """GPUs of each worker, possibly a fraction of one."""
    cpus: int
    """CPU cores of each worker."""
    slots: int
    """Trials at a time in each worker; an upper bound unless `is_fixed`."""
    is_fixed: bool
    """Whether `slots` does not depend on memory."""
    why: str
    """Why there are this many, for the user; empty if nothing limits them."""
    num_shards: int = 1
    """Workers that hold one base in pieces, on one machine."""


def plan_fleet(spec: SweepSpec, address: str | None) -> FleetPlan:
    """Choose the workers by the resources that the cluster has or may start.

    Raises:
        RequestError: the cluster cannot run them, see `_choose_gpus`.
    """
    resources, gpus = spec.resources, _choose_gpus(spec, address)
    if spec.num_shards > 1:
        return _plan_shards(spec)
    max_concurrent, requested = max_concurrent_trials(spec), resources.trials_per_gpu
    # SFTTrainer's training loop cannot share a process: trials that share a GPU have a process each.
    is_alone = "training.engine" not in spec.search.space | spec.search.tied and spec.training.engine == "trl"
    workers_per_gpu = requested if is_alone and gpus == 1 and requested != "auto" else 1
    # The capacity is 0 on a cluster that has not started its nodes yet.
    capacity = _capacity(gpus, resources.cpus_per_trial, workers_per_gpu, resources.accelerator) or max_concurrent
    num_workers, slots = spread(max_concurrent, "auto" if is_alone else requested, capacity)
    if is_alone:
        slots, why = 1, "training.engine trl has a process for each trial"
    elif gpus > 1:
        slots, why = 1, f"a trial takes {gpus} GPUs, one of which works at a time (resources.strategy pipeline)"
    elif requested != "auto":
        why = f"resources.trials_per_gpu is {requested}"
    elif slots == 1:
        why = "there are no more trials at a time than workers"
    else:
        why = ""  # if memory lets a worker have fewer slots, it says so
    if max_concurrent < spec.search.total_trials:
        limit = f"resources.max_concurrent lets {max_concurrent} of {spec.search.total_trials} trials run at a time"
        why = f"{why}; {limit}" if why else limit
    is_fixed = slots == 1 or requested != "auto"
    return FleetPlan(num_workers, gpus / workers_per_gpu, resources.cpus_per_trial, slots, is_fixed, why)


def _plan_shards(spec: SweepSpec) -> FleetPlan:
    """Choose workers of one GPU each, as many as hold whole bases in pieces."""
    resources, size = spec.resources, spec.num_shards
    max_concurrent, requested = max_concurrent_trials(spec), resources.trials_per_gpu
    num_bases = _capacity(size, size * resources.cpus_per_trial, 1, resources.accelerator) or max_concurrent
    num_workers, _ = spread(max_concurrent, requested, num_bases * size)
    num_workers += -num_workers % size
    slots = -(-max_concurrent // num_workers)
    slots = slots if requested == "auto" else min(requested, slots)
    why = f"{size} workers hold one base in pieces (resources.strategy shard)"
    return FleetPlan(num_workers, 1, resources.cpus_per_trial, slots, slots == 1 or requested != "auto", why, size)


@contextmanager
def compiling_early(spec: SweepSpec, address: str | None) -> Iterator[None]:
    """Compile kernels for the workers (`precompile`) before Ray starts, if it will start on this machine.

    If the guessed shapes are wrong, workers compile the missing kernels themselves.
    """
    resources, is_local = spec.resources, address is None and not ray.is_initialized()
    num_gpus, gpus = upstream.num_visible_gpus() if is_local else 0, resources.gpus_per_trial
    if num_gpus and gpus != 0:
        capacity = max(1, min(num_gpus, (os.cpu_count() or 1) // resources.cpus_per_trial))
        _, slots = spread(max_concurrent_trials(spec), resources.trials_per_gpu, capacity)
        precompile.start(spec.corners_on_base(), slots if gpus in ("auto", 1) or spec.num_shards > 1 else 1)
    try:
        yield
    finally:
        precompile.stop()


class Fleet:
    """The workers that a driver has started."""

    def __init__(self, plan: FleetPlan, spec: SweepSpec) -> None:
        """Start the workers. Each imports heavy libraries in its own process."""
        self._plan = plan
        self._notice: PlacementNotice | None = None
        self._supervisor: Supervisor | None = None
        self._resources = spec.resources
        self._kind = kind_of_gpu(spec.resources.accelerator if plan.gpus else None)
        self._groups: list[Any] = []
        """Placement groups of workers that hold a base in pieces."""
        self._handles: list[Any] = []
        if plan.num_shards == 1:
            self._handles = [self._start_worker(spec, "SPREAD", None) for _ in range(plan.num_workers)]
        for _ in range(plan.num_workers // plan.num_shards if plan.num_shards > 1 else 0):
            self._handles += self._start_group(spec)

    def _start_group(self, spec: SweepSpec) -> list[Any]:
        """Start the workers that hold one base in pieces, on one machine."""
        bundle = {"CPU": self._plan.cpus - _CPUS_LEFT_FREE, "GPU": self._plan.gpus, **self._kind}
        bundle = {kind: amount for kind, amount in bundle.items() if amount}
        group = placement_group([bundle] * self._plan.num_shards, strategy="STRICT_PACK")
        self._groups.append(group)
        return [
            self._start_worker(spec, PlacementGroupSchedulingStrategy(group, place.rank), place)
            for place in new_group(self._plan.num_shards)
        ]

    def _start_worker(self, spec: SweepSpec, where: Any, place: Place | None) -> Any:
        plan = self._plan
        actor = ray.remote(
            num_gpus=plan.gpus,
            num_cpus=plan.cpus - _CPUS_LEFT_FREE,
            resources=self._kind,
            max_restarts=-1,
            max_concurrency=2 * plan.slots + 16,  # one thread waits for each trial's events
            scheduling_strategy=where,
        )(Worker)
        return actor.remote(spec, plan.slots, plan.is_fixed, plan.gpus, place)

    def open(self, data: PreparedData, paths: SweepPaths, say: Callable[[str], None]) -> tuple[Workers, int, str]:
        """Have the workers load the base model.

        Args:
            data: tokenized rows.
            paths: the sweep's paths.
            say: called with messages while the cluster has no free resources for a worker; from a thread, later too.

        Returns:
            The workers, for trainables; the number of slots of all workers together; and a message about the choice.

        Raises:
            OrchestratorError: no worker can load the base model.
        """
        plan = self._plan
        workers = Workers(
            handles=self._handles,
            ready=[upstream.when_ready(handle) for handle in self._handles],
            data=ray.put(data),
            logs=paths.workers,
        )
        self._notice = PlacementNotice(workers.ready, plan.gpus, plan.cpus, say, self._resources.accelerator)
        self._supervisor = Supervisor(workers, paths, self._resources, say, plan.num_shards)
        self._supervisor.start()
        slots, why = (plan.slots, "") if plan.is_fixed else self._supervisor.first_slots()
        # GPUs of several kinds have room for different numbers of trials.
        is_uneven = not plan.is_fixed and plan.gpus and self._resources.accelerator is None and len(_kinds()) > 1
        every = self._supervisor.all_slots(_OTHERS_S) if is_uneven else [slots] * plan.num_workers
        each = f"{min(every)} to {max(every)} trials" if min(every) < max(every) else counted(slots, "trial")
        device = f"{plan.gpus:g} GPU" if plan.gpus else f"{counted(plan.cpus, 'CPU core')}"
        reasons = "; ".join(filter(None, [plan.why, why]))
        message = f"{counted(plan.num_workers, 'worker')} of {device}, {each} at a time in each" + (
            f": {reasons}" if reasons else ""
        )
        return workers, sum(every), message

    def gpu_memory(self, workers: Workers) -> "GpuMemory | None":
        """Return what trials may use of a worker's GPU; None for workers on CPUs.

        Args:
            workers: of `open`.

        Raises:
            OrchestratorError: no worker could load the base model.
        """
        if not self._plan.gpus:
            return None
        memory: GpuMemory | None = _first_answer([workers.measure_memory(handle) for handle in self._handles])
        return memory

    @property
    def resources(self) -> tuple[float, int]:
        """GPUs and CPU cores of a process that holds a whole base: those of all workers that hold one in pieces."""
        return self._plan.gpus * self._plan.num_shards, self._plan.cpus

    def fault(self) -> OrchestratorError | None:
        """Return why the sweep cannot go on; None while it can."""
        return None if self._supervisor is None else self._supervisor.fault()

    def end(self) -> None:
        """End the workers, if that was not done before."""
        if self._supervisor is not None:
            self._supervisor.stop()
        if self._notice is not None:
            self._notice.stop()
        while self._handles:
            ray.kill(self._handles.pop())
        while self._groups:
            remove_placement_group(self._groups.pop())


@contextmanager
def start_fleet(spec: SweepSpec, address: str | None) -> Iterator[Fleet]:
    """Start the workers of a sweep, and end them with the block.

    Raises:
        RequestError: see `plan_fleet`.
    """
    fleet = Fleet(plan_fleet(spec, address), spec)
    try:
        yield fleet
    finally:
        fleet.end()


def _choose_gpus(spec: SweepSpec, address: str | None) -> int:
    """Return the GPUs of a trial.

    Raises:
        RequestError: `gpus_per_trial` is `auto` on a cluster that has no GPU now (it may be about to start some, and
            training on CPUs should not be a guess); the experiment needs a GPU where there is none; or it asks for more
            than a single machine has, where Ray would wait forever.
    """
    resources, available = spec.resources, ray.cluster_resources()
    num_gpus, num_cpus = available.get("GPU", 0), available.get("CPU", 0)
    gpus = resources.gpus_per_trial
    if gpus == "auto":
        gpus = 1 if num_gpus >= 1 else 0
        if address is not None and not gpus:
            raise RequestError(
                f"resources.gpus_per_trial is auto, but the cluster at {address} has no GPU at this moment",
                "Set resources.gpus_per_trial=1 (to start and wait for GPU workers) or =0 (to train on CPUs).",
            )
    if gpus == 0 and spec.search.budget.gpu_hours is not None:
        raise RequestError(
            "search.budget.gpu_hours would never be spent: this machine has no GPU",
            "Give search.budget.wall_clock_hours or tokens.",
        )
    if gpus == 0 and (reason := spec.cpu_unsupported_reason()):
        raise RequestError(f"{reason}, and this machine has none")
    kinds = _kinds()
    if gpus and address is None and resources.accelerator not in (None, *kinds):
        here = " and ".join(kinds) or "no kind that Ray knows"
        raise RequestError(
            f"resources.accelerator is {resources.accelerator}; this machine has {here}",
            "Leave it out, or give --address of a cluster that has this kind.",
        )
    cpus = spec.num_shards * resources.cpus_per_trial
    if address is None and (gpus > num_gpus or cpus > num_cpus):
        raise RequestError(
            f"a worker needs {gpus} GPUs and {cpus} CPU cores; this machine has {num_gpus:g} and {num_cpus:g}",
            "Change resources.gpus_per_trial (auto uses the GPUs that exist) or cpus_per_trial, or give --address.",
        )
    return gpus


def _capacity(gpus: int, cpus: int, workers_per_gpu: int, accelerator: str | None) -> int:
    """Return the number of workers that fit into the cluster, counting the nodes that its autoscaler may start.

    Which kinds of GPU these will have is not known; they count as the kind that is asked for.
    """
    now = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        by_cpus = int(has.get("CPU", 0)) // cpus
        if gpus and not kind_of_gpu(accelerator).keys() <= has.keys():
            continue
        now += min(int(has.get("GPU", 0)) // gpus * workers_per_gpu, by_cpus) if gpus else by_cpus
    limits = upstream.autoscaler_limits()
    kind, each = ("GPU", gpus) if gpus else ("CPU", cpus)
    return max(now, int(limits.get(kind, 0)) // each * (workers_per_gpu if gpus else 1))


def _kinds() -> list[str]:
    """Return the kinds of GPU that the cluster has now."""
    return [kind.removeprefix(KIND_PREFIX) for kind in sorted(ray.cluster_resources()) if kind.startswith(KIND_PREFIX)]


def _first_answer(answers: list[Any]) -> Any:
    """Return the answer of the worker that opens first: the others are equal to it, or wait for resources.

    Raises:
        OrchestratorError: no worker has opened.
    """
    fault: Exception | None = None
    while answers:
        (done,), answers = ray.wait(answers)
        try:
            answer = ray.get(done)
        except RayError as error:
            fault = error
        else:
            return answer
    if isinstance(fault, RayTaskError) and (isinstance(fault.cause, OrchestratorError) or storage_fault(fault.cause)):
        raise fault.cause
    raise SweepError(f"no worker could be started: {str(fault).strip().splitlines()[-1]}") from fault
