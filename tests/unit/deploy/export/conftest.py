"""Shared by the tests of exports: an adapter, rows, a target, and the record of what was loaded."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_qwen import BF16, COMMIT, FP32, MakeAdapterRef, qwen, save_adapter, save_base
from transformers import LlamaForCausalLM

from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export import check
from orchestrator.embedded import BASE_DIR
from orchestrator.spec.sections import BaseSection


@pytest.fixture
def adapter(tmp_path: Path) -> AdapterRef:
    """A random adapter on the embedded base, without trial.json."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(BASE_DIR)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return AdapterRef(
        "adapter", tmp_path / "adapter", BaseSection(model="embedded", compute_dtype="float32"), None, None
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "What is the total of 1 and 2?", "completion": " 3"}\n' * 3)
    return path


@pytest.fixture
def out(tmp_path: Path, adapter: AdapterRef, rows: Path) -> Iterator[Path]:
    """A target folder. The test fails if it, or anything beside it, exists afterwards."""
    before = set(tmp_path.rglob("*"))
    assert {adapter.folder, rows} < before
    yield tmp_path / "out"
    assert set(tmp_path.rglob("*")) == before


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records the device maps of the loaded adapters."""
    calls: list[Any] = []
    load = check.load_model

    def note(adapter: AdapterRef, device_map: Any) -> Any:
        calls.append(device_map)
        return load(adapter, device_map)

    monkeypatch.setattr(check, "load_model", note)
    return calls


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapterRef:
    """Saves a small Qwen2 and an adapter for it: `make_adapter(base_dtype=..., base_fields={...}, **lora)`."""

    def make(
        base_dtype: str = BF16, shape: dict[str, Any] | None = None, base_fields: Any = None, **lora: Any
    ) -> AdapterRef:
        base = save_base(qwen(**(shape or {})), tmp_path / "base", base_dtype)
        adapter = save_adapter(qwen(**(shape or {})), tmp_path / "adapter", **lora)
        section = BaseSection(model=str(base), **({"compute_dtype": FP32} | (base_fields or {})))
        return AdapterRef("adapter", adapter, section, None, None)

    return make


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one base, `someone/small` at COMMIT, and no network."""
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / "models--someone--small"
    shutil.copytree(BASE_DIR, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repo
