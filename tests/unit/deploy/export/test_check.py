"""The check of an export: correct and wrong merges, errors, and notes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from orchestrator.adapters.bundle import WEIGHTS
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export import check
from orchestrator.deploy.export.export import export
from orchestrator.deploy.export.merge import Merge, plan_merge
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import ExportError
from orchestrator.spec.sections import BaseSection


def on_8_bits(adapter: AdapterRef) -> AdapterRef:
    """Replace the adapter with one on all linear layers of a base in 8 bits and float16."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(BASE_DIR), config).save_pretrained(adapter.folder)
    return replace(adapter, base=BaseSection(model="embedded", compute_dtype="float16", quantization="int8"))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_merge_from_8_bits_passes_the_check(adapter: AdapterRef, rows: Path, tmp_path: Path, dtype: Any) -> None:
    """LLM.int8() also quantizes activations; the check excludes that difference."""
    lines: list[str] = []
    done = export(on_8_bits(adapter), tmp_path / "out", "merged", dtype, data=rows, say=lines.append)
    assert 0 < done.parity.difference < {"fp16": 0.001, "bf16": 0.008}[dtype]
    assert done.parity.effect > 0.1
    assert lines[-1].startswith("note: LLM.int8() also quantizes activations")


def test_a_wrong_merge_from_8_bits_is_detected(
    adapter: AdapterRef, rows: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def louder(*how: Any) -> Merge:
        right = plan_merge(*how)
        return replace(
            right, updates={name: replace(each, scale=each.scale * 1.05) for name, each in right.updates.items()}
        )

    given = on_8_bits(adapter)
    monkeypatch.setattr("orchestrator.deploy.export.export.plan_merge", louder)
    with pytest.raises(ExportError, match="does not answer as the adapter does"):
        export(given, out, "merged", data=rows)


def test_another_error_in_the_check_leaves_nothing_behind(
    adapter: AdapterRef, rows: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(check, "measure_parity", fail)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        export(adapter, out, "merged", data=rows)


def test_an_adapter_with_less_effect_than_rounding_gets_a_note(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    weights = load_file(adapter.folder / WEIGHTS)
    faint = {name: weight * (1e-4 if "lora_B" in name else 1) for name, weight in weights.items()}
    save_file(faint, adapter.folder / WEIGHTS)
    lines: list[str] = []
    done = export(adapter, tmp_path / "out", "merged", data=rows, say=lines.append)
    assert 0 < done.parity.effect < done.parity.difference < 0.01
    assert lines[-1].startswith("note: the adapter moves the logits no more than rounding does")
