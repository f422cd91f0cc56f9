"""Whether a single trial fits into a GPU's memory: the same answer as a plan's, from config.json alone."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.planning.corners import empty_outlook
from orchestrator.planning.fit import FitCheck, GpuMemory
from orchestrator.planning.gpus import GIB, GPUS
from orchestrator.training.engines.check_targets import EmptyBases
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from tests.unit.planning.conftest import MakeSpec

SPACE = {"lora.rank": {"choice": [8, 256]}}


@pytest.fixture
def data(rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    train, held_out = rows(512)
    monkeypatch.setattr(TokenizedRows, "of", lambda part: part)
    return SimpleNamespace(train=train, held_out=held_out)


@pytest.mark.parametrize("gib", [8.0, 9.0, 12.0, 40.0])
def test_a_trial_fits_where_a_plan_says_so(
    gib: float, make_spec: MakeSpec, shape_folder: Callable[[str], str], data: Any
) -> None:
    search = {"algorithm": "grid", "space": {"lora.rank": {"grid": [8, 256]}}}
    spec = make_spec(base={"model": shape_folder("7b")}, training={"steps": 30}, search=search)
    memory = GpuMemory(int(gib * GIB), has_grouped_products=True)
    outlook = empty_outlook(spec.base, EmptyBases(), GPUS["h200"], (data.train, data.held_out), memory.budget)
    assert outlook is not None
    check = FitCheck(spec, data, memory)
    for rank in (8, 256):
        config = spec.trial_config({"lora.rank": rank})
        assert (check(config) is None) is outlook.corner(config).fits


def test_the_reason_says_what_is_needed_and_what_there_is(
    make_spec: MakeSpec, shape_folder: Callable[[str], str], data: Any
) -> None:
    spec = make_spec(base={"model": shape_folder("7b")}, training={"steps": 30}, lora={"rank": 256})
    reason = FitCheck(spec, data, GpuMemory(9 * GIB, True))(spec.trial_config({}))
    assert reason is not None
    needed = float(reason.removeprefix("needs ").split(" GiB")[0])
    assert needed > 9
    assert reason.endswith("trials may use 9 GiB")


def test_what_trl_trains_is_not_dropped(make_spec: MakeSpec, data: Any) -> None:
    for change in ({"lora": {"dora": True}}, {"training": {"steps": 3, "engine": "trl"}}):
        spec = make_spec(**{"base": {"compute_dtype": "bfloat16"}, "training": {"steps": 3}, **change})
        assert FitCheck(spec, data, GpuMemory(1, True))(spec.trial_config({})) is None


def test_a_machine_without_a_gpu_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert GpuMemory.here() is None
