"""The number of workers, and of trials at a time in each."""

import os
from typing import Any

import pytest

from orchestrator import upstream
from orchestrator.errors import RequestError
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.sweep.workers.fleet import FleetPlan, compiling_early, plan_fleet
from orchestrator.training.fast.warmup import precompile

ADDRESS = "10.0.0.1:6379"


def spec(num_trials: int, *overrides: str) -> SweepSpec:
    return load_spec("experiments/demo.yaml", [f"search.num_trials={num_trials}", *overrides])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`cluster({"CPU": 8, "GPU": 2}, ...)` sets the resources of its nodes; `most`: what an autoscaler may start."""

    def make(*nodes: dict[str, float], most: dict[str, int] | None = None) -> None:
        import ray

        there = {kind: sum(node.get(kind, 0) for node in nodes) for kind in {"CPU", "GPU"}.union(*nodes)}
        monkeypatch.setattr(ray, "cluster_resources", lambda: there)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
        monkeypatch.setattr(upstream, "autoscaler_limits", lambda: most or {})

    return make


def shape(plan: FleetPlan) -> tuple[int, float, int, bool]:
    return plan.num_workers, plan.gpus, plan.slots, plan.is_fixed


@pytest.mark.parametrize(
    ("num_trials", "overrides", "expected"),
    [
        (8, [], (2, 1, 4, False)),
        (7, [], (2, 1, 4, False)),
        (2, [], (2, 1, 1, True)),
        (1, [], (1, 1, 1, True)),
        (8, ["resources.max_concurrent=3"], (2, 1, 2, False)),
        (8, ["resources.max_concurrent=1"], (1, 1, 1, True)),
        (8, ["resources.trials_per_gpu=3"], (2, 1, 3, True)),
        (4, ["resources.trials_per_gpu=4"], (1, 1, 4, True)),
        (8, ["resources.trials_per_gpu=1"], (2, 1, 1, True)),
        (8, ["resources.gpus_per_trial=2"], (1, 2, 1, True)),
        (8, ["resources.gpus_per_trial=0"], (8, 0, 1, True)),
        (8, ["resources.gpus_per_trial=0", "resources.cpus_per_trial=4"], (4, 0, 2, False)),
        (8, ["training.engine=trl"], (2, 1, 1, True)),
        (8, ["training.engine=trl", "resources.trials_per_gpu=3"], (6, 1 / 3, 1, True)),
        (2, ["training.engine=trl", "resources.trials_per_gpu=3"], (2, 1 / 3, 1, True)),
    ],
)
def test_two_gpus_on_one_machine(
    cluster: Any, num_trials: int, overrides: list[str], expected: tuple[Any, ...]
) -> None:
    cluster({"CPU": 16, "GPU": 2})
    assert shape(plan_fleet(spec(num_trials, *overrides), None)) == expected


@pytest.mark.parametrize(
    ("num_trials", "overrides", "slots"),
    [
        (8, [], [4]),
        (8, ["resources.max_concurrent=3"], [2]),
        (8, ["resources.trials_per_gpu=3"], [3]),
        (4, ["resources.trials_per_gpu=4"], [4]),
        (8, ["resources.gpus_per_trial=2"], [1]),
        (8, ["resources.gpus_per_trial=0"], []),
        (8, ["resources.cpus_per_trial=8"], [8]),
    ],
)
def test_kernels_are_compiled_for_as_many_slots_as_workers_will_have(
    monkeypatch: pytest.MonkeyPatch, num_trials: int, overrides: list[str], slots: list[int]
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(precompile, "start", lambda _, num_slots: begun.append(num_slots))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(upstream, "num_visible_gpus", lambda: 2)

    def compile_for(address: str | None) -> None:
        with compiling_early(spec(num_trials, *overrides), address):
            pass

    compile_for(None)
    assert begun == slots
    compile_for(ADDRESS)
    monkeypatch.setattr(upstream, "num_visible_gpus", lambda: 0)
    compile_for(None)
    assert begun == slots, "nothing is compiled for GPUs of other machines, or without a GPU"


@pytest.mark.parametrize(("visible", "gpus"), [(None, 4), ("0,2", 2), ("", 0), ("0,1,2,3,4", 4)])
def test_gpus_are_counted_as_ray_counts_them(monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int) -> None:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert upstream.num_visible_gpus() == gpus


def test_only_the_kind_of_gpu_that_is_asked_for_counts(cluster: Any) -> None:
    cluster(
        {"CPU": 16, "GPU": 2, "accelerator_type:L4": 1},
        {"CPU": 64, "GPU": 4, "accelerator_type:H100": 1},
        {"CPU": 16},
    )
    assert plan_fleet(spec(16), ADDRESS).num_workers == 6
    assert shape(plan_fleet(spec(16, "resources.accelerator=H100"), ADDRESS)) == (4, 1, 4, False)
    assert plan_fleet(spec(16, *SHARDED, "resources.accelerator=L4"), ADDRESS).num_workers == 2


def test_workers_for_a_kind_that_is_not_there_yet_are_planned_by_the_autoscaler(cluster: Any) -> None:
    cluster({"CPU": 2}, {"CPU": 16, "GPU": 2, "accelerator_type:L4": 1}, most={"GPU": 3})
    wanted = ("resources.accelerator=H100", "resources.gpus_per_trial=1")
    assert plan_fleet(spec(16, *wanted), ADDRESS).num_workers == 3


def test_a_machine_with_another_kind_of_gpu_is_refused(cluster: Any) -> None:
    cluster({"CPU": 16, "GPU": 2, "accelerator_type:L4": 1})
    with pytest.raises(RequestError, match=r"resources\.accelerator is H100; this machine has L4"):
        plan_fleet(spec(8, "resources.accelerator=H100"), None)
    assert plan_fleet(spec(8, "resources.accelerator=L4"), None).num_workers == 2


def test_a_machine_without_gpus(cluster: Any) -> None:
    cluster({"CPU": 2})
    assert shape(plan_fleet(spec(8), None)) == (2, 0, 4, False)
    assert shape(plan_fleet(spec(8, "resources.trials_per_gpu=8", "resources.cpus_per_trial=2"), None)) == (
        1,
        0,
        8,
        True,
    )
    assert shape(plan_fleet(spec(8, "training.engine=trl", "resources.trials_per_gpu=4"), None)) == (2, 0, 1, True)


def test_gpu_hours_are_refused_as_budget_without_a_gpu(cluster: Any) -> None:
    cluster({"CPU": 2})
    with pytest.raises(RequestError, match=r"search.budget.gpu_hours would never be spent: this machine has no GPU"):
        plan_fleet(spec(8, "search.budget.gpu_hours=1"), None)
    cluster({"CPU": 2, "GPU": 1})
    assert plan_fleet(spec(8, "search.budget.gpu_hours=1"), None).gpus == 1


def test_a_setting_that_needs_a_gpu_is_refused_without_one(cluster: Any) -> None:
    cluster({"CPU": 2})
    for overrides in (["training.precision=fp16"], ["search.space.training.precision={choice: [auto, fp16]}"]):
        with pytest.raises(
            RequestError, match=r"precision fp16 .* scales its gradients on a GPU, and this machine has"
        ):
            plan_fleet(spec(8, *overrides), None)
        cluster({"CPU": 2, "GPU": 1})
        assert plan_fleet(spec(8, *overrides), None).gpus == 1
        cluster({"CPU": 2})


def test_a_worker_is_on_one_node(cluster: Any) -> None:
    cluster({"CPU": 3, "GPU": 3}, {"CPU": 3, "GPU": 3})
    assert plan_fleet(spec(8, "resources.gpus_per_trial=2"), ADDRESS).num_workers == 2
    assert plan_fleet(spec(8, "resources.cpus_per_trial=2"), ADDRESS).num_workers == 2


SHARDED = ["resources.gpus_per_trial=2", "resources.strategy=shard"]


@pytest.mark.parametrize(
    ("num_trials", "overrides", "expected"),
    [
        (16, SHARDED, (4, 1, 4, False)),
        (3, SHARDED, (4, 1, 1, True)),
        (1, SHARDED, (2, 1, 1, True)),
        (16, [*SHARDED, "resources.max_concurrent=4"], (4, 1, 1, True)),
        (16, [*SHARDED, "resources.trials_per_gpu=2"], (4, 1, 2, True)),
        (16, ["resources.gpus_per_trial=4", "resources.strategy=shard"], (4, 1, 4, False)),
        (16, ["resources.gpus_per_trial=2", "training.engine=fast"], (4, 1, 4, False)),
        (16, [*SHARDED, "resources.cpus_per_trial=4"], (2, 1, 8, False)),
    ],
)
def test_a_base_in_pieces_has_a_worker_for_each_gpu(
    cluster: Any, num_trials: int, overrides: list[str], expected: tuple[Any, ...]
) -> None:
    cluster({"CPU": 8, "GPU": 5})
    plan, gpus = plan_fleet(spec(num_trials, *overrides), ADDRESS), spec(num_trials, *overrides).num_shards
    assert (shape(plan), plan.num_shards) == (expected, gpus)
    assert plan.num_workers % gpus == 0
    assert "hold one base in pieces" in plan.why


def test_pieces_of_a_base_are_on_one_machine(cluster: Any) -> None:
    cluster({"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3})
    assert plan_fleet(spec(64, *SHARDED), ADDRESS).num_workers == 4


def test_a_cluster_that_can_grow(cluster: Any) -> None:
    cluster({"CPU": 0}, most={"CPU": 32, "GPU": 4})
    assert shape(plan_fleet(spec(8, "resources.gpus_per_trial=1"), ADDRESS)) == (4, 1, 2, False)
    shared = ["resources.gpus_per_trial=1", "training.engine=trl", "resources.trials_per_gpu=2"]
    assert shape(plan_fleet(spec(9, *shared), ADDRESS)) == (8, 0.5, 1, True)
    cluster({"CPU": 0})  # without a limit from an autoscaler
    assert shape(plan_fleet(spec(8, "resources.gpus_per_trial=1"), ADDRESS)) == (8, 1, 1, True)
    with pytest.raises(RequestError, match="has no GPU at this moment"):
        plan_fleet(spec(8), ADDRESS)


@pytest.mark.parametrize("wanted", ["resources.gpus_per_trial=1", "resources.cpus_per_trial=3"])
def test_a_request_beyond_the_machine_is_refused(cluster: Any, wanted: str) -> None:
    cluster({"CPU": 2})
    with pytest.raises(RequestError, match="this machine has 0 and 2"):
        plan_fleet(spec(8, wanted), None)


def test_the_reasons_that_are_given(cluster: Any) -> None:
    cluster({"CPU": 16, "GPU": 2})
    assert plan_fleet(spec(8), None).why == ""
    assert plan_fleet(spec(8, "resources.trials_per_gpu=2"), None).why == "resources.trials_per_gpu is 2"
    limited = plan_fleet(spec(8, "resources.max_concurrent=1"), None).why
    assert plan_fleet(spec(8, "resources.max_concurrent=4"), None).why == (
        "resources.max_concurrent lets 4 of 8 trials run at a time"
    )
    assert limited.endswith("; resources.max_concurrent lets 1 of 8 trials run at a time")
    assert "max_concurrent" not in plan_fleet(spec(8, "resources.max_concurrent=8"), None).why
    assert "engine trl" in plan_fleet(spec(8, "training.engine=trl"), None).why
