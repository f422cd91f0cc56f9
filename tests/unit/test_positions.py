"""How many positions a base has, which bases fail beyond them, and where a row's length changes other rows."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from orchestrator.adapters.generate import answer, require_room
from orchestrator.adapters.stops import stop_at
from orchestrator.base import load_tokenizer, share_modules
from orchestrator.deploy.scoring.row_scores import score_rows
from orchestrator.errors import RequestError
from orchestrator.positions import (
    fails_beyond_limit,
    forget_earlier_batches,
    independent_length,
    position_limit,
    rows_per_pass,
)
from orchestrator.spec.sections import BaseSection

LIMIT = 32
SHAPE: dict[str, Any] = {
    "vocab_size": 514, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": LIMIT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
LLAMA = SHAPE | {"num_key_value_heads": 2}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": LIMIT,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "phi3": LLAMA,
    "gemma3_text": LLAMA | {"head_dim": 8},
    "gpt_neox": SHAPE,
    "bloom": {"vocab_size": 514, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "xglm": {
        "vocab_size": 514, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
        "max_position_embeddings": LIMIT,
    },
    "gpt2": SHAPE,
    "gpt_bigcode": SHAPE,
    "gpt_neo": SHAPE | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"vocab_size": 514, "n_positions": LIMIT, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "codegen": {"vocab_size": 514, "n_positions": LIMIT, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "ctrl": {"vocab_size": 514, "n_positions": LIMIT, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4},
    "opt": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": SHAPE,
    "mpt": {"vocab_size": 514, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": LIMIT},
}  # fmt: skip
FAILING = {"gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "ctrl", "opt", "biogpt", "mpt"}


def build(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**FAMILIES[kind], **fields})
    return AutoModelForCausalLM.from_config(config).eval()


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 512, (1, length), generator=torch.Generator().manual_seed(seed))


def rows(*lengths: int) -> list[dict[str, list[int]]]:
    made = [ids(length, seed)[0].tolist() for seed, length in enumerate(lengths)]
    return [{"input_ids": row, "labels": row} for row in made]


@pytest.mark.parametrize("kind", FAMILIES)
def test_bases_that_fail_beyond_their_positions_are_known(kind: str) -> None:
    model = build(kind)
    assert position_limit(model.config) == (None if kind == "bloom" else LIMIT)
    assert fails_beyond_limit(model) is (kind in FAILING)
    with torch.no_grad():
        model(input_ids=ids(LIMIT))
        if kind in FAILING:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids(LIMIT + 1))
        else:
            model(input_ids=ids(LIMIT + 1))


SCALINGS: dict[str, tuple[dict[str, Any], int, int | None]] = {
    "none": ({"rope_type": "default", "rope_theta": 1e4}, 32, None),
    "linear": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 128, None),
    "dynamic": (DYNAMIC, 128, 32),
    "YaRN, length before scaling": ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, 128, None),
    "YaRN, length after scaling": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}, 32, None,
    ),
    "Llama 3.1": (
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16,
         "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 32, None,
    ),
    "longrope": (LONGROPE | {"original_max_position_embeddings": 8}, 32, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_counts(name: str) -> None:
    rope, limit, independent = SCALINGS[name]
    config = LlamaConfig(**LLAMA, rope_parameters=dict(rope))
    assert position_limit(config) == limit
    assert independent_length(config) == independent


def test_each_type_of_layer_may_have_its_own_scaling() -> None:
    ropes = {"full_attention": dict(DYNAMIC), "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    model = build("gemma3_text", rope_parameters=ropes, layer_types=["full_attention", "sliding_attention"])
    assert (position_limit(model.config), independent_length(model.config)) == (128, 32)
    assert_independent_of_order(model)


def test_rows_share_a_pass_where_their_lengths_change_nothing() -> None:
    config = LlamaConfig(**LLAMA, rope_parameters=dict(DYNAMIC))
    assert [rows_per_pass(config, 8, longest) for longest in (LIMIT, LIMIT + 1, None)] == [8, 1, 1]
    assert rows_per_pass(LlamaConfig(**LLAMA), 8, None) == 8


def test_dynamic_ntk_depends_on_its_own_batch_only() -> None:
    assert_independent_of_order(build("llama", rope_parameters=dict(DYNAMIC)))


def assert_independent_of_order(model: Any) -> None:
    """Compare a row's logits before and after longer and shorter rows, in a copy of the modules too."""

    def logits(of: Any) -> torch.Tensor:
        return of(input_ids=ids(40)).logits

    with torch.no_grad():
        first = logits(model)
        model(input_ids=ids(60))
        assert not torch.allclose(logits(model), first, atol=1e-4), "transformers keeps what the longest row needed"
        model(input_ids=ids(8))
        forget_earlier_batches(model)
        for each in (model, share_modules(model)):
            each(input_ids=ids(60))
            assert torch.equal(logits(each), first)
            each(input_ids=ids(8))
            assert torch.equal(logits(each), first)


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_scores_and_answers_do_not_depend_on_the_batch_size(rope: dict[str, Any]) -> None:
    model = build("llama", rope_parameters=dict(rope), max_position_embeddings=LIMIT * 4 if rope is LONGROPE else LIMIT)
    forget_earlier_batches(model)
    data = rows(12, 30, 40, 60)
    alone, together = (score_rows(model, data, batch_size) for batch_size in (1, 4))
    assert alone == together
    stop_at(model, [2])
    tokenizer, prompts = load_tokenizer(BaseSection(model="embedded")), [row["input_ids"][:-1] for row in data]
    assert answer(model, tokenizer, prompts, 8, 4) == [answer(model, tokenizer, [each], 8, 1)[0] for each in prompts]


def test_a_row_or_an_answer_that_the_base_cannot_hold_is_refused() -> None:
    model = build("gpt2")
    assert len(score_rows(model, rows(LIMIT), 1).losses) == 1
    with pytest.raises(RequestError, match="a row has 33 tokens, but the base has 32 positions"):
        score_rows(model, rows(3, LIMIT + 1), 1)
    require_room(model, LIMIT - 8, 8)
    with pytest.raises(RequestError, match="a prompt of 25 tokens and an answer of up to 8 do not fit into the 32"):
        require_room(model, LIMIT - 7, 8)
    require_room(build("llama"), LIMIT, 8)
