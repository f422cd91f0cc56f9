"""The base of an export: its shape, and its revision on the hub."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_qwen import COMMIT
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.deploy.adapter_ref import AdapterRef, at_commit
from orchestrator.deploy.export.export import export
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 96}, "size mismatch for base_model.model.model.layers.0.self_attn.q_proj"),
        ({"num_hidden_layers": 3}, "model.layers.3.self_attn.q_proj.lora_A.weight exists in only one of them"),
        ({"num_hidden_layers": 5}, "model.layers.4.self_attn.q_proj.lora_A.weight exists in only one of them"),
    ],
    ids=str,
)
def test_a_base_of_another_shape_is_rejected_for_format_adapter(
    adapter: AdapterRef,
    rows: Path,
    out: Path,
    tmp_path_factory: pytest.TempPathFactory,
    shape: dict[str, int],
    message: str,
) -> None:
    base = tmp_path_factory.mktemp("base")
    shutil.copytree(BASE_DIR, base, dirs_exist_ok=True)
    LlamaForCausalLM(LlamaConfig.from_pretrained(BASE_DIR, **shape)).save_pretrained(base)
    other = AdapterRef("adapter", adapter.folder, BaseSection(model=str(base), compute_dtype="float32"), None, None)
    with pytest.raises(RequestError, match="adapter and base do not match") as refused:
        export(other, out, "adapter", data=rows)
    assert message in refused.value.message
    assert "base of another shape" in refused.value.remedy


def of_hub(adapter: AdapterRef, commit: str) -> AdapterRef:
    """Change the adapter as if its base had come from the hub at this commit."""
    path = adapter.folder / "adapter_config.json"
    text = path.read_text().replace('"revision": null', f'"revision": "{commit}"')
    path.write_text(
        text.replace(f'"base_model_name_or_path": "{BASE_DIR}"', '"base_model_name_or_path": "someone/small"')
    )
    assert commit in path.read_text()
    base = at_commit(BaseSection(model="someone/small", compute_dtype="float32"), adapter.folder)
    return replace(adapter, base=base)


@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_a_base_at_another_revision_is_rejected(
    adapter: AdapterRef, rows: Path, tmp_path: Path, hub: Path, format: Any
) -> None:
    assert (hub / "refs" / "main").read_text() == COMMIT
    other = COMMIT[::-1]
    with pytest.raises(RequestError, match=f"base.model someone/small at revision {other}: cannot be loaded"):
        export(of_hub(adapter, other), tmp_path / "out", format, data=rows)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "rows.jsonl"}


@pytest.mark.long
def test_the_base_is_loaded_at_the_adapters_commit_after_its_branch_has_moved(
    adapter: AdapterRef, rows: Path, tmp_path: Path, hub: Path
) -> None:
    later = COMMIT[::-1]
    shutil.copytree(hub / "snapshots" / COMMIT, hub / "snapshots" / later)
    (hub / "refs" / "main").write_text(later)
    model = LlamaForCausalLM.from_pretrained(BASE_DIR)
    model.model.embed_tokens.weight.data.normal_()
    model.save_pretrained(hub / "snapshots" / later)
    done = export(of_hub(adapter, COMMIT), tmp_path / "hub", "merged", data=rows)
    assert done.parity == export(adapter, tmp_path / "embedded", "merged", data=rows).parity


@pytest.mark.long
def test_a_base_that_is_not_on_the_hub_is_noted(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    export(adapter, tmp_path / "adapter-out", "adapter", data=rows, say=lines.append)
    assert lines[-1].startswith(f"note: the base is not on the hub: adapter_config.json names {BASE_DIR}, a folder of")
    lines.clear()
    export(adapter, tmp_path / "merged-out", "merged", data=rows, say=lines.append)
    assert not any("not on the hub" in line for line in lines)
