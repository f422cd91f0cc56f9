"""Each dense family of docs/bases.md trains, and plain PEFT loads its adapter with the recorded loss."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_bases import DENSE
from one_trial import Tiny, curve, run
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.data import load
from orchestrator.deploy.scoring.row_scores import score_rows
from orchestrator.embedded import BASE_DIR
from orchestrator.record import SweepPaths

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "bases.md"

SHAPE: dict[str, Any] = {
    "vocab_size": 514, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    "initializer_range": 0.1,
}  # fmt: skip
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 256,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("llama", {}),
    "Llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "Mistral": ("mistral", {"sliding_window": 8}),
    "Ministral": ("ministral", WINDOW | {"head_dim": 16}),
    "Ministral 3": ("ministral3", {"head_dim": 16}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Phi-3": ("phi3", {"sliding_window": 8}),
    "Phi-4-mini": ("phi3", {"partial_rotary_factor": 1.0, "rope_parameters": LONGROPE, "tie_word_embeddings": True}),
    "Gemma": ("gemma", {"head_dim": 16}),
    "Gemma 2": ("gemma2", WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "Gemma 3": ("gemma3_text", WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "Granite 3": (
        "granite",
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "Granite 4": (
        "granitemoehybrid",
        DENSE["granitemoehybrid"] | {"position_embedding_type": "rope", "embedding_multiplier": 12.0},
    ),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW),
    "GPT-NeoX": ("gpt_neox", {}),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "StarCoder2": ("starcoder2", {}),
    "Cohere 2": ("cohere2", WINDOW),
    "GLM-4": ("glm4", {"head_dim": 8}),
    "Qwen3.5": ("qwen3_5_text", LINEAR | {"head_dim": 16}),
}


def test_the_page_names_the_families_that_are_tested_here() -> None:
    rows = re.findall(r"^\| .* \| `(\w+)` \| .* \| (.*) \| .*\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {kind for kind, tested in rows if "reload" in tested} == {kind for kind, _ in FAMILIES.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_plain_peft_loads_its_adapter(family: str, tmp_path: Path, tiny: Tiny) -> None:
    kind, fields = FAMILIES[family]
    base, folder = tmp_path / "base", SweepPaths(tmp_path / "run")
    shutil.copytree(BASE_DIR, base)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SHAPE | fields))).save_pretrained(base)
    rows = ["data.max_rows=48", "data.held_out={count: 8}"]
    own = [*rows, f"base.model={base}", "base.quantization=none", "base.compute_dtype=float32", "training.engine=trl"]
    result = run(tiny(*own, "training.steps=4", "training.eval_steps=4"), folder)
    assert result.num_parameters
    (recorded,) = [values["eval/loss"] for _, values in curve(folder) if "eval/loss" in values]
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        str(folder.trial(result.trial_id).adapter(4)),
    )
    assert score_rows(plain, load(folder.data).held_out, 8).loss == pytest.approx(recorded, rel=1e-6)
    with plain.disable_adapter():
        assert score_rows(plain, load(folder.data).held_out, 8).loss != pytest.approx(recorded, abs=1e-3)
