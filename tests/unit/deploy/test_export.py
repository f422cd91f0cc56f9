"""What cannot be exported is refused before a model is loaded, and leaves nothing."""

import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from orchestrator.adapters.bundle import MANIFEST, WEIGHTS, Facts, seal, verify
from orchestrator.deploy.adapter_ref import AdapterRef, at_commit
from orchestrator.deploy.export import check, memory_limit, ray_serve
from orchestrator.deploy.export.export import export
from orchestrator.deploy.export.merge import Merge, plan_merge
from orchestrator.deploy.export.parity import Source
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import ExportError, RecordError, RequestError
from orchestrator.spec.sections import BaseSection

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def adapter(tmp_path: Path) -> AdapterRef:
    """A random adapter on the embedded base, that says nothing of its rows."""
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
    """A target; nothing may lie there, nor beside it, afterwards."""
    before = set(tmp_path.rglob("*"))
    assert {adapter.folder, rows} < before
    yield tmp_path / "out"
    assert set(tmp_path.rglob("*")) == before


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was loaded."""
    calls: list[Any] = []
    load = check.load_model

    def note(adapter: AdapterRef, place: Any) -> Any:
        calls.append(place)
        return load(adapter, place)

    monkeypatch.setattr(check, "load_model", note)
    return calls


@pytest.mark.parametrize("how", [{"dtype": "fp16"}, {"onto": "original"}], ids=str)
def test_how_to_merge_is_no_option_of_an_adapter(adapter: AdapterRef, rows: Path, out: Path, how: Any) -> None:
    with pytest.raises(RequestError, match="--format adapter does not merge"):
        export(adapter, out, "adapter", data=rows, **how)


def test_a_target_that_exists_stays_as_it_is(
    adapter: AdapterRef, rows: Path, tmp_path: Path, loaded: list[Any]
) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "mine").touch()
    file.write_text("mine")
    for target in (folder, file):
        with pytest.raises(RequestError, match=f"{target}: already exists"):
            export(adapter, target, "merged", data=rows)
    with pytest.raises(RequestError, match=r"below: cannot be made: .*File exists"):
        export(adapter, file / "below", "merged", data=rows)
    assert file.read_text() == "mine"
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert loaded == []


def test_a_link_to_an_empty_folder_stays_one(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "empty")
    export(adapter, tmp_path / "link", "adapter", data=rows)
    assert (tmp_path / "link").is_symlink()
    assert verify(tmp_path / "link").facts.format == "adapter"
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["empty"]


def test_a_link_to_itself_is_refused(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(RequestError, match=f"{tmp_path / 'link'}: "):
        export(adapter, tmp_path / "link", "adapter", data=rows)


def test_a_mount_point_is_refused_before_anything_is_made(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")
    with pytest.raises(RequestError, match=f"{tmp_path / 'disk'}: is a mount point") as refused:
        export(adapter, tmp_path / "disk", "adapter", data=rows)
    assert "Give a folder in it" in refused.value.remedy
    assert loaded == []


def test_what_cannot_be_put_in_its_place_is_kept_whole(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    def take_the_place(line: str) -> None:
        if line == "loading the export back":
            (tmp_path / "out" / "mine").mkdir(parents=True)

    with pytest.raises(ExportError, match="out: was exported and checked, but cannot be put in its place") as told:
        export(adapter, tmp_path / "out", "adapter", data=rows, say=take_the_place)
    (kept,) = tmp_path.glob(".building-*")
    assert str(kept) in told.value.remedy
    assert verify(kept).facts.format == "adapter"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_adapter_that_says_nothing_of_its_rows_needs_some(adapter: AdapterRef, out: Path, loaded: list[Any]) -> None:
    with pytest.raises(RequestError, match="does not say what it was trained on") as told:
        export(adapter, out, "merged")
    assert "--data FILE" in told.value.remedy
    assert loaded == []


@pytest.mark.parametrize(("format", "least", "most"), [("adapter", 10_000, 100_000), ("merged", 3_444_096, 40 << 20)])
def test_a_disk_without_room_is_told_with_what_is_needed(
    adapter: AdapterRef, rows: Path, out: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Any],
    format: Any, least: int, most: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=least))
    with pytest.raises(RequestError, match=r"the disk is too full: this export needs 0\.\d\d GiB, free are 0\.00 GiB"):
        export(adapter, out, format, data=rows)
    assert loaded == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=most))
    with pytest.raises(KeyboardInterrupt):  # as it would go on
        export(adapter, out, format, data=rows, say=interrupt)


def interrupt(_: str) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ({"hidden_size": 96}, "size mismatch for base_model.model.model.layers.0.self_attn.q_proj"),
        ({"num_hidden_layers": 3}, "model.layers.3.self_attn.q_proj.lora_A.weight is in one of them alone"),
        ({"num_hidden_layers": 5}, "model.layers.4.self_attn.q_proj.lora_A.weight is in one of them alone"),
    ],
    ids=str,
)
def test_a_base_of_another_shape_is_refused_for_an_adapter_too(
    adapter: AdapterRef,
    rows: Path,
    out: Path,
    tmp_path_factory: pytest.TempPathFactory,
    shape: dict[str, int],
    told: str,
) -> None:
    base = tmp_path_factory.mktemp("base")
    shutil.copytree(BASE_DIR, base, dirs_exist_ok=True)
    LlamaForCausalLM(LlamaConfig.from_pretrained(BASE_DIR, **shape)).save_pretrained(base)
    other = AdapterRef("adapter", adapter.folder, BaseSection(model=str(base), compute_dtype="float32"), None, None)
    with pytest.raises(RequestError, match="does not fit its base") as refused:
        export(other, out, "adapter", data=rows)
    assert told in refused.value.message
    assert "base of another shape" in refused.value.remedy


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one base in it, `someone/small` at COMMIT, and no network."""
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / "models--someone--small"
    shutil.copytree(BASE_DIR, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repo


def of_hub(adapter: AdapterRef, commit: str) -> AdapterRef:
    """The adapter as it would be had its base come from the hub, at this commit of its branch."""
    path = adapter.folder / "adapter_config.json"
    text = path.read_text().replace('"revision": null', f'"revision": "{commit}"')
    path.write_text(
        text.replace(f'"base_model_name_or_path": "{BASE_DIR}"', '"base_model_name_or_path": "someone/small"')
    )
    assert commit in path.read_text()
    base = at_commit(BaseSection(model="someone/small", compute_dtype="float32"), adapter.folder)
    return replace(adapter, base=base)


@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_a_base_at_another_revision_is_refused(
    adapter: AdapterRef, rows: Path, tmp_path: Path, hub: Path, format: Any
) -> None:
    assert (hub / "refs" / "main").read_text() == COMMIT
    other = COMMIT[::-1]
    with pytest.raises(RequestError, match=f"base.model someone/small at revision {other}: cannot be loaded"):
        export(of_hub(adapter, other), tmp_path / "out", format, data=rows)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "rows.jsonl"}


@pytest.mark.long
def test_the_base_is_that_of_the_adapters_commit_wherever_its_branch_has_gone(
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


def test_a_link_is_refused_before_anything_is_made(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of somebody else")
    (adapter.folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(RecordError, match=r"notes\.txt: is a symbolic link, to .*secret; what it points to"):
        export(adapter, tmp_path / "out", "adapter", data=rows)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_pickle_beside_an_adapter_is_left_out_and_said(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    """trl puts `training_args.bin` there."""
    (adapter.folder / "training_args.bin").write_bytes(b"")
    told: list[str] = []
    done = export(adapter, tmp_path / "out", "adapter", data=rows, say=told.append)
    assert done.files == ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert "training_args.bin is left out: a pickle runs code when it is loaded" in told


@pytest.mark.long
def test_a_base_that_others_lack_is_said(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    told: list[str] = []
    export(adapter, tmp_path / "adapter-out", "adapter", data=rows, say=told.append)
    assert told[-1].startswith(f"note: its base is not on the hub: adapter_config.json names {BASE_DIR}, a folder of")
    told.clear()
    export(adapter, tmp_path / "merged-out", "merged", data=rows, say=told.append)
    assert not any(line.startswith("note") for line in told)


def test_an_adapter_on_the_embedding_brings_that_and_fits(adapter: AdapterRef, rows: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(BASE_DIR)
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(adapter.folder)
    assert export(adapter, tmp_path / "out", "adapter", data=rows).parity.max_logit_difference == 0


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    MemoryError("Cannot allocate memory (os error 12)"),
]


@pytest.mark.parametrize("fault", FULL, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("of", ["load_model", "compare"])
def test_what_there_is_no_memory_to_check_is_kept_and_said(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, of: str
) -> None:
    """Of the source (`load_model`), or of the export."""

    def fail(*_: Any) -> None:
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(check, of, fail)
        with pytest.raises(ExportError, match="out: was written, but cannot be held against its adapter") as told:
            export(adapter, tmp_path / "out", "merged", data=rows)
    kept = tmp_path / "out.unchecked"
    assert str(fault) in told.value.message
    assert f"kept in {kept}, unchecked and without a manifest" in told.value.remedy
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "rows.jsonl", "out.unchecked"}
    assert not (kept / "manifest.json").exists()
    assert LlamaForCausalLM.from_pretrained(kept).dtype == torch.bfloat16
    with pytest.raises(RequestError, match=r"out\.unchecked: is there, which an export .* has left"):
        export(adapter, tmp_path / "out", "merged", data=rows)


def fill(*_: Any) -> None:
    raise FULL[0]


def test_an_unchecked_copy_of_an_adapter_does_not_say_that_it_is_whole(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal(adapter.folder, Facts(format="adapter", base={}, versions={}, metrics={}))
    monkeypatch.setattr(check, "compare", fill)
    with pytest.raises(ExportError, match="not enough memory"):
        export(adapter, tmp_path / "out", "adapter", data=rows)
    assert (tmp_path / "out.unchecked" / WEIGHTS).exists()
    assert not (tmp_path / "out.unchecked" / MANIFEST).exists()


def test_an_unchecked_application_names_the_model_where_it_is_kept(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_serve, "require_ray_serve", lambda: None)
    monkeypatch.setattr(ray_serve, "check", lambda _: None)
    monkeypatch.setattr(check, "compare", fill)
    with pytest.raises(ExportError, match="not enough memory"):
        export(adapter, tmp_path / "out", "ray-serve", data=rows)
    kept = tmp_path / "out.unchecked"
    text = (kept / ray_serve.FILE).read_text()
    assert f"model_source: {kept / ray_serve.MODEL}\n" in text
    assert str(tmp_path / "out" / ray_serve.MODEL) not in text


SPREAD = {"model": "cpu", "lm_head": "disk"}
"""What accelerate makes of a base that all GPUs together have no room for."""


@pytest.mark.parametrize("of", ["source", "export"])
def test_a_quantized_base_that_fits_onto_no_gpus_is_asked_on_the_cpu(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    assert adapter.base.quantization == "nf4"
    load, told = check.load_model, list[str]()
    if of == "export":
        monkeypatch.setattr(check, "load_model", lambda adapter, _: load(adapter, {"": "cpu"}))
    monkeypatch.setattr(check, "device_name", lambda: "as if two")
    monkeypatch.setattr(check, "device_map", lambda: SPREAD)
    export(adapter, tmp_path / "out", "adapter", data=rows, say=told.append)
    assert told.count("loading the export back") == (1 if of == "source" else 2)
    assert (
        "the GPU has too little memory, so that both are asked on the CPU: the GPUs together have no room for the base "
        "in its quantized form"
    ) in told


@pytest.mark.parametrize(
    ("limit", "taken", "prefix"),
    [
        ("memory.max", "memory.current", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
    ],
    ids=["cgroup 2", "cgroup 1"],
)
def test_memory_is_what_the_container_has_left(
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
    assert memory_limit.available_bytes() == 10**9, "it does not tell what the kernel could give back"
    statistics = (tmp_path / limit).with_name("memory.stat")
    statistics.write_text(f"anon 2000000\n{prefix}active_file 300000\n{prefix}inactive_file 100000\n")
    assert memory_limit.available_bytes() == 2400000
    assert check._room(True) == {0: int(8e9 * check._SHARE), "cpu": int(2400000 * check._SHARE)}
    write(taken, "6000000\n")
    assert memory_limit.available_bytes() == 0, "over its limit"
    write(limit, "max\n" if limit == "memory.max" else f"{2**63 - 4096}\n")
    assert memory_limit.available_bytes() == 10**9, "there is no limit"


def test_a_base_that_memory_cannot_hold_is_not_loaded(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    """The kernel would end the process, which then could tell nothing, nor take away what it has begun."""
    monkeypatch.setattr(memory_limit, "available_bytes", lambda: 1 << 20)
    stored_otherwise = replace(adapter, base=adapter.base.model_copy(update={"quantization": "none"}))
    with pytest.raises(ExportError, match=r"the base alone takes 0\.01 GiB, available are 0\.00 GiB"):
        export(stored_otherwise, tmp_path / "out", "merged", data=rows)
    assert loaded == []
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "rows.jsonl", "out.unchecked"}


def test_a_gguf_file_that_memory_cannot_hold_is_not_loaded(
    adapter: AdapterRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"0" * 10)
    monkeypatch.setattr(memory_limit, "available_bytes", lambda: 9)
    with pytest.raises(MemoryError, match=r"the model in model\.gguf takes"):
        check._compare(Source([], 0.0), tmp_path, adapter, "gguf", "bf16", [], on_gpu=False)


def test_there_is_room_for_weights_where_gpu_and_cpu_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate then tells of the GPU alone."""
    monkeypatch.setattr("accelerate.utils.modeling.is_mps_available", lambda: True)
    room = check._room(False)
    assert room.keys() == {"cpu"}
    assert room["cpu"] > 1 << 27


def on_8_bits(adapter: AdapterRef) -> AdapterRef:
    """An adapter on all matrices of the base, which is held in 8 bits and float16."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(BASE_DIR), config).save_pretrained(adapter.folder)
    return replace(adapter, base=BaseSection(model="embedded", compute_dtype="float16", quantization="int8"))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_merge_from_8_bits_is_right_within_its_own_rounding(
    adapter: AdapterRef, rows: Path, tmp_path: Path, dtype: Any
) -> None:
    """LLM.int8 rounds the inputs of its products too, which says nothing of the merge."""
    told: list[str] = []
    done = export(on_8_bits(adapter), tmp_path / "out", "merged", dtype, data=rows, say=told.append)
    assert 0 < done.parity.difference < {"fp16": 0.001, "bf16": 0.008}[dtype]
    assert done.parity.effect > 0.1
    assert told[-1].startswith("note: 8-bit products round their inputs as well")


def test_a_wrong_merge_from_8_bits_is_found(
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


def test_another_fault_of_the_check_leaves_nothing(
    adapter: AdapterRef, rows: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(check, "compare", fail)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        export(adapter, out, "merged", data=rows)


@pytest.mark.long
def test_what_the_gpu_cannot_hold_is_asked_on_the_cpu(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    """Both of them: the same weights answer otherwise on another device."""
    comparing, faults, told = check.compare, [FULL[0]], list[str]()

    def compare(*arguments: Any) -> Any:
        if faults:
            raise faults.pop()
        return comparing(*arguments)

    monkeypatch.setattr(check, "compare", compare)
    monkeypatch.setattr(check, "device_name", lambda: "as if one")
    monkeypatch.setattr(check, "device_map", lambda: "cpu")
    done = export(adapter, tmp_path / "out", "adapter", data=rows, say=told.append)
    assert loaded == ["cpu", {"": "cpu"}]
    assert done.parity.max_logit_difference == 0
    assert "the GPU has too little memory, so that both are asked on the CPU: CUDA out of memory" in " ".join(told)


def test_a_model_that_memory_cannot_hold_stays_on_the_disk(
    adapter: AdapterRef, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(adapter, tmp_path / "whole", "merged", data=rows)
    monkeypatch.setattr(check, "_room", lambda _: {"cpu": 1 << 20})  # of 3.4 MB
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
    load, compare = check.load_model, check._compare

    def note(*arguments: Any) -> Any:
        model = load(*arguments)
        held.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    def alone(*arguments: Any) -> Any:
        assert held
        assert [weight() for weight in held if weight() is not None] == []
        return compare(*arguments)

    monkeypatch.setattr(check, "load_model", note)
    monkeypatch.setattr(check, "_compare", alone)
    export(adapter, tmp_path / "out", "merged", data=rows)


def test_an_adapter_that_hardly_moves_its_base_is_said_not_to_be_seen(
    adapter: AdapterRef, rows: Path, tmp_path: Path
) -> None:
    weights = load_file(adapter.folder / WEIGHTS)
    faint = {name: weight * (1e-4 if "lora_B" in name else 1) for name, weight in weights.items()}
    save_file(faint, adapter.folder / WEIGHTS)
    told: list[str] = []
    done = export(adapter, tmp_path / "out", "merged", data=rows, say=told.append)
    assert 0 < done.parity.effect < done.parity.difference < 0.01
    assert told[-1].startswith("note: the adapter moves the logits too little to be told from rounding")
