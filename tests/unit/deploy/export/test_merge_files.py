"""Files of a merged model: shards, configurations, tokenizer, stop tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from safetensors.torch import load_file
from small_qwen import (
    FP32,
    MakeAdapterRef,
    assert_same,
    merged,
    qwen,
    save_adapter,
    save_base,
    weights,
)
from transformers import AutoTokenizer

from orchestrator.adapters.stops import write_stops
from orchestrator.base import load_base
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.chat import open_prompt_form
from orchestrator.deploy.export.merge import plan_merge
from orchestrator.embedded import BASE_DIR
from orchestrator.spec import parse_spec
from orchestrator.spec.sections import BaseSection


def test_shards_equal_a_single_file(make_adapter: MakeAdapterRef, tmp_path: Path) -> None:
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


def test_a_merged_model_has_all_files_and_a_16_bit_configuration(make_adapter: MakeAdapterRef, tmp_path: Path) -> None:
    given = make_adapter()
    (Path(given.base.model) / "modeling_own.py").write_text("# code of the base\n")
    merged(given, tmp_path / "merged", "fp16")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert "quantization_config" not in config
    for name in ("generation_config.json", "modeling_own.py"):
        assert (tmp_path / "merged" / name).read_bytes() == (Path(given.base.model) / name).read_bytes()
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "merged", BASE_DIR))
    assert ours.chat_template == theirs.chat_template
    assert ours("What is 1 and 2?").input_ids == theirs("What is 1 and 2?").input_ids


def test_the_chat_template_of_a_merged_model_gives_the_prompt_of_the_training_rows(
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


@pytest.mark.parametrize(
    ("template", "eos"),
    [
        ("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}", "<|end|>"),
        (
            "{{ eos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
            "</s>",
        ),  # it is in prompts
    ],
)
def test_a_merged_model_stops_at_the_adapters_stop_tokens(tmp_path: Path, template: str, eos: str) -> None:
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
    assert kept["temperature"] == 0.9, "other generation settings stay"
    found = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (found.eos_token, found.chat_template) == (eos, template)
