"""The memory of corners on a GPU that is not here, from config.json alone."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.errors import RequestError
from orchestrator.planning.corners import Outlook, empty_outlook, plan_corners
from orchestrator.planning.gpus import GPUS, find_gpu, gpu_here
from orchestrator.spec import SweepSpec
from orchestrator.training.engines.check_targets import EmptyBases
from tests.unit.planning.conftest import MakeSpec

MakeRows = Callable[..., Any]


def outlook(spec: SweepSpec, gpu: str, rows: Any, budget: int | None = None) -> Outlook:
    found = empty_outlook(spec.base, EmptyBases(), GPUS[gpu], rows, budget)
    assert found is not None
    return found


def test_the_memory_of_a_7b_trial_is_that_which_an_h200_measured(
    make_spec: MakeSpec, shape_folder: Callable[[str], str], rows: MakeRows
) -> None:
    """docs/benchmarks.md, "Memory at 7B": 24.47 GiB with the base kept, at 4 rows of up to 512 tokens."""
    spec = make_spec(base={"model": shape_folder("7b")}, training={"steps": 30}, lora={"rank": 16})
    corner = outlook(spec, "h200", rows(512)).corner(spec.trial_config({}))
    assert corner.fits
    assert corner.engine == "fast"
    assert corner.form is not None
    assert corner.form.startswith("base kept dequantized")
    assert corner.total_gib == pytest.approx(24.47, rel=0.15)
    assert corner.memory_gib["base"] == pytest.approx(3.5, rel=0.1)


def test_a_base_in_pieces_takes_a_share_of_its_layers_on_each_gpu(
    make_spec: MakeSpec, shape_folder: Callable[[str], str], rows: MakeRows
) -> None:
    """Llama-2-70B: 68.5 billion weights in 80 layers, at 0.5158 bytes; 1 GiB of embeddings and head is not cut."""
    resources = {"gpus_per_trial": 8, "strategy": "shard"}
    spec = make_spec(base={"model": shape_folder("llama-2-70b")}, training={"steps": 30}, resources=resources)
    config = spec.trial_config({})
    found = empty_outlook(spec.base, EmptyBases(), GPUS["a100-40"], rows(512), None, spec.num_shards)
    assert found is not None
    pieces, whole = found.corner(config), outlook(spec, "a100-40", rows(512)).corner(config)
    linears = 68.45e9 * (0.5 + (1 + 4 / 256) / 64) / 2**30
    assert whole.memory_gib["base"] == pytest.approx(linears + 1, rel=0.02)
    assert pieces.memory_gib["base"] == pytest.approx(linears / 8 + 2 * linears / 80 + 1, rel=0.02)
    assert pieces.memory_gib["dequantized"] == 0
    assert (pieces.fits, whole.fits) == (True, False)


def test_a_smaller_gpu_gets_a_form_that_takes_less(
    make_spec: MakeSpec, shape_folder: Callable[[str], str], rows: MakeRows
) -> None:
    spec = make_spec(base={"model": shape_folder("7b")}, training={"steps": 30})
    config, data = spec.trial_config({}), rows(512)
    large, small = outlook(spec, "h200", data).corner(config), outlook(spec, "l4", data, 14 * 2**30).corner(config)
    assert large.memory_gib["dequantized"] > 10
    assert small.memory_gib["dequantized"] == 0
    assert small.total_gib is not None
    assert small.total_gib < 14
    assert (small.step_s or 0) > (large.step_s or 0)


def test_corners_that_cannot_fit_are_named(
    make_spec: MakeSpec, shape_folder: Callable[[str], str], rows: MakeRows
) -> None:
    space = {"lora.rank": {"choice": [8, 256]}, "training.learning_rate": {"loguniform": [1e-5, 1e-3]}}
    search = {"algorithm": "random", "num_trials": 4, "space": space}
    spec = make_spec(base={"model": shape_folder("7b")}, training={"steps": 30}, search=search)
    found = plan_corners(spec, {spec.base: outlook(spec, "h200", rows(512), budget=9 * 2**30)})
    assert [(corner.rank, corner.fits) for corner in found] == [(256, False), (8, True)], "learning rates do not count"
    assert found[0].values["lora.rank"] == 256
    assert "Lower data.max_length or lora.rank" in (found[0].reason or "")


def test_what_trl_trains_is_not_foreseen(make_spec: MakeSpec, rows: MakeRows) -> None:
    spec = make_spec(base={"compute_dtype": "bfloat16"}, lora={"dora": True}, training={"steps": 3})
    corner = outlook(spec, "h200", rows(64)).corner(spec.trial_config({}))
    assert (corner.engine, corner.fits, corner.memory_gib, corner.step_s) == ("trl", None, {}, None)
    assert corner.reason == "lora.dora"
    asked = make_spec(base={"compute_dtype": "bfloat16"}, training={"steps": 3, "engine": "trl"})
    assert outlook(asked, "h200", rows(64)).corner(asked.trial_config({})).reason is None


def test_experts_need_a_gpu_with_grouped_products(
    make_spec: MakeSpec, shape_folder: Callable[[str], str], rows: MakeRows
) -> None:
    lora = {"target_modules": ["q_proj", "v_proj"]}
    spec = make_spec(base={"model": shape_folder("qwen3-30b-a3b")}, lora=lora, training={"steps": 3})
    config, data = spec.trial_config({}), rows(512)
    assert outlook(spec, "h200", data).reason(config) is None
    assert "compute capability" in (outlook(spec, "a100-80", data).reason(config) or "")


def test_as_many_trials_share_a_gpu_as_fit(
    make_spec: MakeSpec, shape_folder: Callable[[str], str], rows: MakeRows
) -> None:
    spec = make_spec(base={"model": shape_folder("7b")}, training={"steps": 30}, lora={"rank": 64})
    configs, data = [spec.trial_config({})], rows(190)
    many, _ = outlook(spec, "h200", data).slots(configs, 16)
    few, why = outlook(spec, "a10", data).slots(configs, 16)
    assert many == 16
    assert 1 <= few < 16
    assert "do not fit" in why


def test_a_gpu_that_is_not_known_is_refused() -> None:
    assert find_gpu("H200") is GPUS["h200"]
    with pytest.raises(RequestError, match="--gpu b300: is not a GPU that plans are made for"):
        find_gpu("b300")


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10"),
        ("NVIDIA L4", "l4"),
    ],
)
def test_the_gpu_of_this_machine_is_known_by_its_name(
    reported: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: reported)
    assert gpu_here() is GPUS[name]


@pytest.mark.parametrize("reported", ["NVIDIA GeForce RTX 4090", "NVIDIA L40"])
def test_a_gpu_of_unknown_rates_is_refused(reported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: reported)
    with pytest.raises(RequestError, match=f"{reported}: its rates are not known"):
        gpu_here()
