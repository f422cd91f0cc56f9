"""Merging: what is written is to the bit what loading and PEFT make of base and adapter, weight by weight."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from jinja2 import TemplateError
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from orchestrator.adapters.stops import write_stops
from orchestrator.base import load_base
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.chat import open_prompt_form
from orchestrator.deploy.dtypes import DTYPES, Dtype
from orchestrator.deploy.export.base_files import find_base_files, loaded_bytes
from orchestrator.deploy.export.merge import Merge, Onto, plan_merge
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import RequestError
from orchestrator.spec import parse_spec
from orchestrator.spec.sections import BaseSection

BF16, FP32 = "bfloat16", "float32"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

MakeAdapterRef = Callable[..., AdapterRef]


def qwen(**changes: Any) -> Qwen2ForCausalLM:
    """Two layers, with biases and a head of its own."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
    } | changes  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model


def save_base(model: Any, folder: Path, dtype: str = BF16, max_shard_size: str = "60KB") -> Path:
    """A base in several files, with the embedded one's tokenizer."""
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    for name in TOKENIZER:
        shutil.copyfile(BASE_DIR / name, folder / name)
    return folder


def save_adapter(model: Any, folder: Path, **settings: Any) -> Path:
    """A random adapter on the model, which thereby changes its answers; biases and whole modules are changed too."""
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(config | settings)))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(folder, save_embedding_layers=False)  # as `Adapter.of` has it
    return folder


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapterRef:
    """`make_adapter(compute_dtype=..., base_dtype=..., **lora)`: a small Qwen2 in files, and an adapter for it."""

    def make(base_dtype: str = BF16, shape: dict[str, Any] | None = None, form: Any = None, **lora: Any) -> AdapterRef:
        base = save_base(qwen(**(shape or {})), tmp_path / "base", base_dtype)
        adapter = save_adapter(qwen(**(shape or {})), tmp_path / "adapter", **lora)
        section = BaseSection(model=str(base), **({"compute_dtype": FP32} | (form or {})))
        return AdapterRef("adapter", adapter, section, None, None)

    return make


def merged(adapter: AdapterRef, folder: Path, dtype: Dtype = "bf16", onto: Onto = "dequantized", **how: Any) -> Any:
    """The merged model as transformers loads it."""
    folder.mkdir()
    plan_merge(adapter, dtype, onto).write(folder, **how)
    return AutoModelForCausalLM.from_pretrained(folder)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype] == []
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        {"compute_dtype": BF16},
        {"compute_dtype": FP32, "double_quant": False},
        {"compute_dtype": "float16", "quantization": "fp4"},
        {"compute_dtype": BF16, "quantization": "none"},
        {"compute_dtype": BF16, "quantization": "int8"},
    ],
    ids=str,
)
def test_the_base_is_to_the_bit_the_one_that_is_loaded_for_training(
    make_adapter: MakeAdapterRef, tmp_path: Path, form: dict[str, Any], tied: bool
) -> None:
    given = make_adapter(base_dtype=FP32, shape={"tie_word_embeddings": tied}, form=form, target_modules=["q_proj"])
    loaded = load_base(given.base)
    expected = {name: parameter for name, parameter in loaded.named_parameters() if ".q_proj." not in name}
    packed = {name for name, module in loaded.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}
    assert len(packed) == (0 if given.base.quantization == "none" else 2 * 7), "all linear layers but the head"
    for name in packed:
        expected |= {f"{name}.weight": dequantize_module_weight(loaded.get_submodule(name))}
    found = weights(merged(given, tmp_path / "merged", "fp16" if form["compute_dtype"] == "float16" else "bf16"))
    for name in expected.keys() - {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}:
        assert torch.equal(expected[name].to(found[name].dtype), found[name]), name
    assert plan_merge(given, "bf16", "original").quantized is None
    assert {f"{name}.weight" for name in packed} == set(plan_merge(given, "bf16", "dequantized").quantized or ())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 7}},
        {"bias": "all", "modules_to_save": ["lm_head"]},
        {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "modules_to_save": ["norm"]},
        {"trainable_token_indices": {"embed_tokens": [3, 500], "lm_head": [3, 500]}, "target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_a_merge_is_to_the_bit_pefts_own_in_float32(
    make_adapter: MakeAdapterRef, tmp_path: Path, lora: dict[str, Any], onto: Onto, dtype: Dtype
) -> None:
    given = make_adapter(**lora)
    plain = qwen().to(torch.bfloat16).float()  # the files' values
    if onto == "dequantized":
        for name, layer in load_base(given.base).named_modules():
            if isinstance(layer, Linear4bit):
                plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    expected = PeftModel.from_pretrained(plain, given.folder).merge_and_unload()
    bare = qwen().to(getattr(torch, DTYPES[dtype]))
    expected.to(getattr(torch, DTYPES[dtype]))
    assert any(not torch.equal(weights(bare)[name], weight) for name, weight in weights(expected).items())
    assert_same(weights(merged(given, tmp_path / "merged", dtype, onto)), weights(expected))


def test_a_weight_for_which_the_gpu_has_no_room_is_merged_on_the_cpu(
    make_adapter: MakeAdapterRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, devices = make_adapter(form={"quantization": "none"}), list[str]()
    expected = weights(merged(given, tmp_path / "expected"))
    work_out = Merge._worked_out

    def on_a_gpu_that_is_full(merge: Merge, name: str, device: str) -> Any:
        devices.append(device)
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.20 GiB.")
        return work_out(merge, name, device)

    monkeypatch.setattr(Merge, "_worked_out", on_a_gpu_that_is_full)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: devices.append("emptied"))
    (tmp_path / "merged").mkdir()
    plan_merge(given, "bf16", "dequantized").write(tmp_path / "merged")
    monkeypatch.undo()
    assert devices.count("cuda") == devices.count("emptied") == devices.count("cpu") > 0
    assert_same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_another_fault_of_the_gpu_is_not_passed_over(
    make_adapter: MakeAdapterRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Merge, name: str, device: str) -> None:
        if device == "cuda":
            raise RuntimeError(f"{name}: CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Merge, "_worked_out", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        plan_merge(make_adapter(), "bf16", "dequantized").value("lm_head.weight")


@pytest.mark.parametrize(
    ("quantization", "compute_dtype"),
    [("none", FP32), ("none", "float16"), ("int8", FP32), ("nf4", FP32), ("fp4", "float16")],
)
def test_the_memory_of_a_base_is_told_without_loading_it(
    make_adapter: MakeAdapterRef, quantization: str, compute_dtype: str
) -> None:
    base = make_adapter(form={"quantization": quantization, "compute_dtype": compute_dtype}).base
    assert loaded_bytes(base) == sum(weight.nbytes for weight in load_base(base).parameters())


@pytest.mark.parametrize("told", [True, False])
def test_weights_that_keep_their_type_are_not_counted(make_adapter: MakeAdapterRef, told: bool) -> None:
    """They stay in their mapped files; the type is that of the files, whether config.json names it or not."""
    base = make_adapter(form={"quantization": "none", "compute_dtype": BF16}).base
    config = Path(base.model) / "config.json"
    if not told:
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": None}))
    assert loaded_bytes(base) == 0


def test_new_tokens_are_in_the_merged_model_and_its_vocabulary(tmp_path: Path) -> None:
    """Embedding and head are one; the rows of the new tokens are those that trained."""
    base = save_base(qwen(tie_word_embeddings=True), tmp_path / "base", FP32)
    section = BaseSection(model=str(base), compute_dtype=FP32, quantization="none", new_tokens=("<|a|>", "<|b|>"))
    ids = [512, 513]
    tokens = {"trainable_token_indices": {"embed_tokens": ids}, "target_modules": ["q_proj"]}
    adapter = save_adapter(load_base(section), tmp_path / "adapter", **tokens)
    found = merged(AdapterRef("adapter", adapter, section, None, None), tmp_path / "merged", "fp16")
    expected = PeftModel.from_pretrained(load_base(section), adapter).merge_and_unload()
    assert found.config.vocab_size == 514
    assert found.get_input_embeddings().weight.shape == (514, 64)
    assert found.lm_head.weight is found.get_input_embeddings().weight
    assert torch.equal(found.get_input_embeddings().weight, expected.get_input_embeddings().weight.half())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("<|b|>", add_special_tokens=False).input_ids == [513]


def test_shards_and_one_file_hold_the_same(make_adapter: MakeAdapterRef, tmp_path: Path) -> None:
    given = make_adapter()
    whole = merged(given, tmp_path / "whole")
    assert [path.name for path in (tmp_path / "whole").glob("*.safetensors*")] == ["model.safetensors"]
    most = 30_000
    assert_same(weights(merged(given, tmp_path / "sharded", shard_bytes=most)), weights(whole))
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan_merge(given, "bf16", "dequantized").num_bytes
    for path in (tmp_path / "sharded").glob("*.safetensors"):
        held = load_file(path)
        assert [index["weight_map"][name] for name in held] == [path.name] * len(held)
        assert len(held) == 1 or sum(weight.nbytes for weight in held.values()) <= most


def test_all_that_belongs_to_the_model_is_there_and_says_16_bit(make_adapter: MakeAdapterRef, tmp_path: Path) -> None:
    given = make_adapter()
    (Path(given.base.model) / "modeling_own.py").write_text("# code that the base brings\n")
    merged(given, tmp_path / "merged", "fp16")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert "quantization_config" not in config
    for name in ("generation_config.json", "modeling_own.py"):
        assert (tmp_path / "merged" / name).read_bytes() == (Path(given.base.model) / name).read_bytes()
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "merged", BASE_DIR))
    assert ours.chat_template == theirs.chat_template
    assert ours("What is 1 and 2?").input_ids == theirs("What is 1 and 2?").input_ids


def test_a_merged_model_is_asked_in_the_form_of_its_training_rows(
    make_adapter: MakeAdapterRef, tmp_path: Path, document: dict[str, Any]
) -> None:
    given = make_adapter()
    document["data"]["template"] = "Q: {question}\nA: {answer}"
    document["base"]["model"] = given.base.model
    given = replace(given, config=parse_spec(document).trial_config({}))
    merged(given, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    turns = [{"role": "user", "content": "What is 1 and 2?"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert asked == open_prompt_form(given).ids("What is 1 and 2?")
    with pytest.raises(TemplateError, match="trained on single questions"):
        tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "3"}, *turns])


def refuse(adapter: AdapterRef, *parts: str, onto: Onto = "dequantized") -> None:
    with pytest.raises(RequestError) as told:
        plan_merge(adapter, "bf16", onto)
    assert [part for part in parts if part not in str(told.value)] == []


@pytest.mark.parametrize("lora", [{}, {"bias": "all", "target_modules": ["q_proj"]}], ids=str)
def test_a_base_of_another_shape_is_refused_with_the_layer_and_both_shapes(
    make_adapter: MakeAdapterRef, tmp_path: Path, lora: dict[str, Any]
) -> None:
    given = make_adapter(**lora)
    shutil.rmtree(given.base.model)
    save_base(qwen(hidden_size=32), tmp_path / "base")
    refuse(given, "model.layers.0.self_attn.q_proj.weight", "(64, 64)", "(32, 32)", "base of another shape")


def test_a_bias_of_another_shape_is_refused(make_adapter: MakeAdapterRef) -> None:
    given = make_adapter(bias="all", target_modules=["down_proj"])
    file = given.folder / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.bias"
    save_file(load_file(file) | {name: torch.zeros(3)}, file)
    refuse(given, "model.layers.0.self_attn.q_proj.bias", "(3,)", "(64,)")


@pytest.mark.parametrize(
    ("layers", "told"), [(1, "model.layers.1.self_attn.q_proj"), (3, "model.layers.2.self_attn.q_proj")]
)
def test_a_base_of_another_depth_is_refused(
    make_adapter: MakeAdapterRef, tmp_path: Path, layers: int, told: str
) -> None:
    given = make_adapter(target_modules=["q_proj"])
    shutil.rmtree(given.base.model)
    save_base(qwen(num_hidden_layers=layers), tmp_path / "base")
    refuse(given, told)


def test_a_base_without_the_adapted_layers_is_refused(make_adapter: MakeAdapterRef) -> None:
    given = make_adapter(target_modules=["q_proj"])
    path = given.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["query_key_value"]}))
    refuse(given, "does not fit the base", "query_key_value")


def test_a_rank_that_is_not_the_matrices_is_refused(make_adapter: MakeAdapterRef) -> None:
    given = make_adapter()
    path = given.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    refuse(given, "self_attn.q_proj: rank 8 by adapter_config.json, but (4, 4)")


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"alora_invocation_tokens": [5]}, "by ALoraLinearVariant; only plain LoRA and DoRA are merged"),
        ({"target_modules": ["embed_tokens"]}, "adapts model.embed_tokens, a Embedding; only linear layers"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "q_proj.lora_B.bias"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_named(make_adapter: MakeAdapterRef, lora: dict[str, Any], told: str) -> None:
    refuse(make_adapter(**lora), told)


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}], ids=str)
def test_a_head_that_shares_the_embedding_is_not_merged_into(
    make_adapter: MakeAdapterRef, lora: dict[str, Any]
) -> None:
    refuse(make_adapter(shape={"tie_word_embeddings": True}, **lora), "lm_head.weight", "shares between its embedding")


def test_only_lora_is_merged(make_adapter: MakeAdapterRef) -> None:
    given = make_adapter()
    get_peft_model(qwen(), IA3Config(task_type="CAUSAL_LM")).save_pretrained(given.folder)
    refuse(given, "is an adapter of type IA3; only LoRA is merged")


def test_bases_that_cannot_be_read_are_told_apart(make_adapter: MakeAdapterRef, tmp_path: Path) -> None:
    given = make_adapter()
    base = Path(given.base.model)
    shard = next(base.glob("model-00002*"))
    shard.rename(tmp_path / "shard")
    refuse(given, f"{shard.name} cannot be found", "must be on this disk")
    (tmp_path / "shard").rename(shard)
    index = base / "model.safetensors.index.json"
    whole = index.read_text()
    name = "model.layers.1.mlp.up_proj.weight"
    index.write_text(whole.replace(name, "transformer.h.1.up.weight"))
    refuse(given, f"holds no weight by the name of {name}")
    index.unlink()
    refuse(given, "has no safetensors", "save_pretrained")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refuse(given, "quantized weights (gptq)", "the 16-bit model that it was made from")
    (base / "config.json").unlink()
    refuse(given, "no model in this folder")


def test_a_base_on_the_hub_is_found_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the hub's cache, with no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--small"
    shutil.copytree(BASE_DIR, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = BaseSection(model="someone/small")
    for revision in (None, "main", commit):
        found = find_base_files(base.model_copy(update={"revision": revision}))
        assert found.folder == repo / "snapshots" / commit
        assert set(found.files) == set(load_file(BASE_DIR / "model.safetensors"))
    other = commit[::-1]
    with pytest.raises(RequestError, match=rf"base\.model someone/small at revision {other}: config\.json cannot"):
        find_base_files(base.model_copy(update={"revision": other}))
    with pytest.raises(RequestError, match=r"base\.model someone/else: config\.json cannot be found"):
        find_base_files(BaseSection(model="someone/else"))


@pytest.mark.parametrize(
    ("template", "eos"),
    [
        ("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}", "<|end|>"),
        ("{{ eos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}", "</s>"),  # whose text must stay
    ],
)
def test_a_merged_model_stops_where_the_adapter_was_trained_to(tmp_path: Path, template: str, eos: str) -> None:
    base = save_base(qwen(), tmp_path / "base", FP32)
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9, "eos_token_id": 2}')
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    section = BaseSection(model=str(base), compute_dtype=FP32, quantization="none")
    adapter = save_adapter(load_base(section), tmp_path / "adapter", target_modules=["q_proj"])
    write_stops(adapter, [512, 2], tokenizer)
    merged(AdapterRef("adapter", adapter, section, None, None), tmp_path / "merged", "fp16")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "merged" / name).read_text())["eos_token_id"] == [512, 2]
    kept = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert kept["temperature"] == 0.9, "what else the base says of generation stays"
    found = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (found.eos_token, found.chat_template) == (eos, template)
