"""Exports: invalid ones are rejected before a model is loaded, and leave nothing behind."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from orchestrator.adapters.bundle import verify
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export.export import export
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import ExportError, RecordError, RequestError


@pytest.mark.parametrize("how", [{"dtype": "fp16"}, {"onto": "original"}], ids=str)
def test_merge_options_are_rejected_for_format_adapter(adapter: AdapterRef, rows: Path, out: Path, how: Any) -> None:
    with pytest.raises(RequestError, match="--format adapter does not merge"):
        export(adapter, out, "adapter", data=rows, **how)


def test_an_existing_target_is_not_changed(adapter: AdapterRef, rows: Path, tmp_path: Path, loaded: list[Any]) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "mine").touch()
    file.write_text("mine")
    for target in (folder, file):
        with pytest.raises(RequestError, match=f"{target}: already exists"):
            export(adapter, target, "merged", data=rows)
    with pytest.raises(RequestError, match=r"below: cannot be created: .*File exists"):
        export(adapter, file / "below", "merged", data=rows)
    assert file.read_text() == "mine"
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert loaded == []


def test_a_link_to_an_empty_folder_stays_a_link(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "empty")
    export(adapter, tmp_path / "link", "adapter", data=rows)
    assert (tmp_path / "link").is_symlink()
    assert verify(tmp_path / "link").facts.format == "adapter"
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["empty"]


def test_a_link_to_itself_is_rejected(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(RequestError, match=f"{tmp_path / 'link'}: "):
        export(adapter, tmp_path / "link", "adapter", data=rows)


def test_a_mount_point_is_rejected_before_a_model_is_loaded(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")
    with pytest.raises(RequestError, match=f"{tmp_path / 'disk'}: is a mount point") as refused:
        export(adapter, tmp_path / "disk", "adapter", data=rows)
    assert "Give a folder in it" in refused.value.remedy
    assert loaded == []


def test_an_export_that_cannot_be_renamed_is_kept(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    def take_target(line: str) -> None:
        if line == "loading the export back":
            (tmp_path / "out" / "mine").mkdir(parents=True)

    with pytest.raises(
        ExportError, match="out: was exported and checked, but cannot be renamed to its final name"
    ) as caught:
        export(adapter, tmp_path / "out", "adapter", data=rows, say=take_target)
    (kept,) = tmp_path.glob(".building-*")
    assert str(kept) in caught.value.remedy
    assert verify(kept).facts.format == "adapter"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_adapter_without_trial_json_needs_rows(adapter: AdapterRef, out: Path, loaded: list[Any]) -> None:
    with pytest.raises(RequestError, match=r"has no trial\.json, so its training data are unknown") as caught:
        export(adapter, out, "merged")
    assert "--data FILE" in caught.value.remedy
    assert loaded == []


@pytest.mark.parametrize(("format", "least", "most"), [("adapter", 10_000, 100_000), ("merged", 3_444_096, 40 << 20)])
def test_a_full_disk_is_reported_with_the_needed_space(
    adapter: AdapterRef, rows: Path, out: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Any],
    format: Any, least: int, most: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=least))
    with pytest.raises(
        RequestError, match=r"the disk is too full: this export needs 0\.\d\d GiB, but only 0\.00 GiB is free"
    ):
        export(adapter, out, format, data=rows)
    assert loaded == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=most))
    with pytest.raises(KeyboardInterrupt):  # the export starts
        export(adapter, out, format, data=rows, say=interrupt)


def interrupt(_: str) -> None:
    raise KeyboardInterrupt


def test_a_symbolic_link_is_rejected_before_anything_is_written(
    adapter: AdapterRef, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("of somebody else")
    (adapter.folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(
        RecordError, match=r"notes\.txt: is a symbolic link to .*secret, which is not a part of this folder"
    ):
        export(adapter, tmp_path / "out", "adapter", data=rows)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_pickle_is_left_out_with_a_note(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    """trl writes `training_args.bin` next to an adapter."""
    (adapter.folder / "training_args.bin").write_bytes(b"")
    lines: list[str] = []
    done = export(adapter, tmp_path / "out", "adapter", data=rows, say=lines.append)
    assert done.files == ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert "training_args.bin is left out: a pickle runs code when it is loaded" in lines


def test_an_adapter_on_the_embedding_is_exported(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(BASE_DIR)
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(adapter.folder)
    assert export(adapter, tmp_path / "out", "adapter", data=rows).parity.max_logit_difference == 0
