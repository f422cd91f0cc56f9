"""Exports with little memory: what runs where, and what is kept."""

import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from orchestrator.adapters.bundle import WEIGHTS, Facts, seal
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export import check, memory_limit, ray_serve
from orchestrator.deploy.export.export import export
from orchestrator.deploy.export.parity import AdapterLogits
from orchestrator.errors import ExportError, RequestError
from orchestrator.record.manifest import MANIFEST

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    MemoryError("Cannot allocate memory (os error 12)"),
]


@pytest.mark.parametrize("fault", FULL, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("of", ["load_model", "measure_parity"])
def test_an_export_without_memory_for_the_check_is_kept(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, of: str
) -> None:
    """Memory runs out for the source (`load_model`) or for the export (`measure_parity`)."""

    def fail(*_: Any) -> None:
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(check, of, fail)
        with pytest.raises(ExportError, match="out: was written, but cannot be compared with the adapter") as caught:
            export(adapter, tmp_path / "out", "merged", data=rows)
    kept = tmp_path / "out.unchecked"
    assert str(fault) in caught.value.message
    assert f"kept in {kept}, unchecked and without a manifest" in caught.value.remedy
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "rows.jsonl", "out.unchecked"}
    assert not (kept / "manifest.json").exists()
    assert LlamaForCausalLM.from_pretrained(kept).dtype == torch.bfloat16
    with pytest.raises(
        RequestError, match=r"out\.unchecked: already exists, left by an export that could not be checked"
    ):
        export(adapter, tmp_path / "out", "merged", data=rows)


def fill(*_: Any) -> None:
    raise FULL[0]


def test_an_unchecked_adapter_has_no_manifest(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal(adapter.folder, Facts(format="adapter", base={}, versions={}, metrics={}))
    monkeypatch.setattr(check, "measure_parity", fill)
    with pytest.raises(ExportError, match="not enough memory"):
        export(adapter, tmp_path / "out", "adapter", data=rows)
    assert (tmp_path / "out.unchecked" / WEIGHTS).exists()
    assert not (tmp_path / "out.unchecked" / MANIFEST).exists()


def test_the_config_of_an_unchecked_application_refers_to_the_kept_model(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_serve, "require_ray_serve", lambda: None)
    monkeypatch.setattr(ray_serve, "validate_config", lambda _: None)
    monkeypatch.setattr(check, "measure_parity", fill)
    with pytest.raises(ExportError, match="not enough memory"):
        export(adapter, tmp_path / "out", "ray-serve", data=rows)
    kept = tmp_path / "out.unchecked"
    text = (kept / ray_serve.FILE).read_text()
    assert f"model_source: {kept / ray_serve.MODEL}\n" in text
    assert str(tmp_path / "out" / ray_serve.MODEL) not in text


SPREAD = {"model": "cpu", "lm_head": "disk"}
"""accelerate's device map for a base that does not fit on all GPUs together."""


@pytest.mark.parametrize("of", ["source", "export"])
def test_a_quantized_base_that_does_not_fit_on_the_gpus_runs_on_the_cpu(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    assert adapter.base.quantization == "nf4"
    load, lines = check.load_model, list[str]()
    if of == "export":
        monkeypatch.setattr(check, "load_model", lambda adapter, _: load(adapter, {"": "cpu"}))
    monkeypatch.setattr(check, "device_name", lambda: "as if two")
    monkeypatch.setattr(check, "device_map", lambda: SPREAD)
    export(adapter, tmp_path / "out", "adapter", data=rows, say=lines.append)
    assert lines.count("loading the export back") == (1 if of == "source" else 2)
    assert (
        "the GPU has too little memory, so both run on the CPU: the quantized base does not fit on all GPUs together"
    ) in lines


@pytest.mark.parametrize(
    ("limit", "taken", "prefix"),
    [
        ("memory.max", "memory.current", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
    ],
    ids=["cgroup 2", "cgroup 1"],
)
def test_available_memory_respects_the_limit_of_the_container(
    limit: str, taken: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_limit, "CGROUP", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**9))
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: 8 * 10**9, "cpu": 10**9})
    (tmp_path / "memory").mkdir()

    def write(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)

    assert memory_limit.available_bytes() == 10**9, "there is no container"
    write(limit, "5000000\n")
    write(taken, "3000000\n")
    assert memory_limit.available_bytes() == 10**9, "without statistics the limit is ignored"
    statistics = (tmp_path / limit).with_name("memory.stat")
    statistics.write_text(f"anon 2000000\n{prefix}active_file 300000\n{prefix}inactive_file 100000\n")
    assert memory_limit.available_bytes() == 2400000
    assert check._max_memory(True) == {0: int(8e9 * check._WEIGHTS_SHARE), "cpu": int(2400000 * check._WEIGHTS_SHARE)}
    write(taken, "6000000\n")
    assert memory_limit.available_bytes() == 0, "over its limit"
    write(limit, "max\n" if limit == "memory.max" else f"{2**63 - 4096}\n")
    assert memory_limit.available_bytes() == 10**9, "there is no limit"


def test_a_base_that_does_not_fit_in_memory_is_not_loaded(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    """The kernel would kill the process, which could then neither report nor clean up."""
    monkeypatch.setattr(memory_limit, "available_bytes", lambda: 1 << 20)
    unquantized = replace(adapter, base=adapter.base.model_copy(update={"quantization": "none"}))
    with pytest.raises(ExportError, match=r"the base alone takes 0\.01 GiB, but only 0\.00 GiB is available"):
        export(unquantized, tmp_path / "out", "merged", data=rows)
    assert loaded == []
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "rows.jsonl", "out.unchecked"}


def test_a_gguf_file_that_does_not_fit_in_memory_is_not_loaded(
    adapter: AdapterRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"0" * 10)
    monkeypatch.setattr(memory_limit, "available_bytes", lambda: 9)
    with pytest.raises(MemoryError, match=r"the model in model\.gguf takes"):
        check._run_export(AdapterLogits([], 0.0), tmp_path, adapter, "gguf", "bf16", [], on_gpu=False)


def test_weights_fit_in_memory_that_gpu_and_cpu_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate then lists only the GPU."""
    monkeypatch.setattr("accelerate.utils.modeling.is_mps_available", lambda: True)
    sizes = check._max_memory(False)
    assert sizes.keys() == {"cpu"}
    assert sizes["cpu"] > 1 << 27


@pytest.mark.long
def test_a_model_that_does_not_fit_on_the_gpu_runs_on_the_cpu(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    """Both models move to the CPU, as logits differ between devices."""
    comparing, faults, lines = check.measure_parity, [FULL[0]], list[str]()

    def compare(*arguments: Any) -> Any:
        if faults:
            raise faults.pop()
        return comparing(*arguments)

    monkeypatch.setattr(check, "measure_parity", compare)
    monkeypatch.setattr(check, "device_name", lambda: "as if one")
    monkeypatch.setattr(check, "device_map", lambda: "cpu")
    done = export(adapter, tmp_path / "out", "adapter", data=rows, say=lines.append)
    assert loaded == ["cpu", {"": "cpu"}]
    assert done.parity.max_logit_difference == 0
    assert "the GPU has too little memory, so both run on the CPU: CUDA out of memory" in " ".join(lines)


def test_a_model_that_does_not_fit_in_memory_stays_on_disk(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(adapter, tmp_path / "whole", "merged", data=rows)
    monkeypatch.setattr(check, "_max_memory", lambda _: {"cpu": 1 << 20})  # of the 3.4 MB needed
    load, maps = AutoModelForCausalLM.from_pretrained, list[Any]()

    def note(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        maps.append(getattr(model, "hf_device_map", {}))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", note)
    spilled = export(adapter, tmp_path / "spilled", "merged", data=rows)
    assert spilled.parity == whole.parity
    assert spilled.files == whole.files
    assert maps[-1]["model.layers"] == "disk"


def test_source_and_export_are_never_both_in_memory(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = list[Any]()
    load, compare = check.load_model, check._run_export

    def note(*arguments: Any) -> Any:
        model = load(*arguments)
        held.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    def alone(*arguments: Any) -> Any:
        assert held
        assert [weight() for weight in held if weight() is not None] == []
        return compare(*arguments)

    monkeypatch.setattr(check, "load_model", note)
    monkeypatch.setattr(check, "_run_export", alone)
    export(adapter, tmp_path / "out", "merged", data=rows)
