"""The expected layers, ranks and parameters of a trial equal PEFT's; what the base lacks is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from orchestrator.base import load_tokenizer, share_modules
from orchestrator.errors import RequestError, TrialError
from orchestrator.spec import TrialConfig, parse_spec
from orchestrator.training.model.peft_model import lora_config, lora_layers
from orchestrator.training.model.targets import expected, expected_extra_trainables, expected_modules

pytestmark = pytest.mark.usefixtures("on_cpu")

MakeConfig = Callable[..., TrialConfig]
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


@pytest.fixture
def trial(document: dict[str, Any]) -> MakeConfig:
    """`trial(rank=4)`: a trial with these fields of lora; `new_tokens` is a field of base."""

    def make(new_tokens: tuple[str, ...] = (), **lora: Any) -> TrialConfig:
        base = {"model": "embedded", "quantization": "none", "compute_dtype": "float32", "new_tokens": list(new_tokens)}
        return parse_spec(document | {"base": base, "lora": {"rank": 4} | lora}).trial_config({})

    return make


def model(**changes: Any) -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | {"attention_bias": True} | changes))


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"dora": True, "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7}},
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "mlp.up_proj"]},
        {"bias": "all", "modules_to_save": ["norm"]},
        {"bias": "lora_only", "modules_to_save": ["lm_head", "input_layernorm"], "target_modules": ["v_proj"]},
        {"modules_to_save": ["down_proj"], "rank_pattern": {".*_proj": 3}},
        {"new_tokens": ("<|a|>", "<|b|>")},
        {"new_tokens": ("<|a|>", "<|b|>"), "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_ranks_and_layers_equal_peft(trial: MakeConfig, lora: dict[str, Any], tied: bool) -> None:
    if tied and "lm_head" in lora.get("modules_to_save", []):
        pytest.skip("refused, see below")
    config = trial(**lora)
    tokenizer = load_tokenizer(config.base)
    base = model(tie_word_embeddings=tied, vocab_size=len(tokenizer)).requires_grad_(False)
    modules = expected_modules(base, config.lora)
    extra = expected_extra_trainables(base, config, modules, tokenizer)
    wanted = expected(config, modules, extra)
    peft = get_peft_model(share_modules(base, own_biases=True), lora_config(config, modules, extra))
    layers = lora_layers(peft)
    assert layers.keys() == modules.keys()
    assert wanted["num_trainable_parameters"] == sum(p.numel() for p in peft.parameters() if p.requires_grad)
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    assert wanted["lora.rank"] == (ranks if len(set(ranks.values())) > 1 else next(iter(ranks.values())))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"layers_to_transform": [1, 3]}, "there is no layer 3 to adapt; this base has [0, 1, 2]"),
        (
            {"rank_pattern": {"query": 3}},
            "lora.rank_pattern: 'query' matches no adapted layer; one is named model",
        ),
        (
            {"alpha_pattern": {"q_proj": 3}, "target_modules": ["v_proj"]},
            "lora.alpha_pattern: 'q_proj' matches no adapted layer; one is named model.layers.0.self_attn.v_proj",
        ),
        ({"modules_to_save": ["head"]}, "lora.modules_to_save: this base has no 'head'; it has act_fn, down_proj,"),
    ],
    ids=str,
)
def test_what_the_base_lacks_is_refused(trial: MakeConfig, lora: dict[str, Any], message: str) -> None:
    base, config = model(), trial(**lora)
    with pytest.raises(TrialError) as caught:
        expected_extra_trainables(base, config, expected_modules(base, config.lora), load_tokenizer(config.base))
    assert message in str(caught.value)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_embedding_tied_to_the_head_is_not_trained_separately(trial: MakeConfig, module: str) -> None:
    base, config = model(tie_word_embeddings=True), trial(modules_to_save=[module])
    with pytest.raises(TrialError, match=r"shares its weight between embedding and head .*\n.*new_tokens"):
        expected_extra_trainables(base, config, expected_modules(base, config.lora), load_tokenizer(config.base))


def test_quantized_layer_is_not_trained_in_full(trial: MakeConfig, base: Any) -> None:
    config = trial(modules_to_save=["down_proj"])
    with pytest.raises(TrialError, match="down_proj is stored as none, which cannot train in full"):
        expected_extra_trainables(base, config, expected_modules(base, config.lora), load_tokenizer(config.base))


def test_new_token_that_the_tokenizer_lacks_is_refused(trial: MakeConfig) -> None:
    config = trial(new_tokens=("<|a|>",))
    with pytest.raises(RequestError, match=r"'<\|a\|>' is not one token"):
        expected_extra_trainables(model(), config, {}, load_tokenizer(trial().base))


def test_module_name_matches_only_as_a_whole(trial: MakeConfig) -> None:
    """PEFT's own rule would also match `norm` with `post_attention_layernorm`."""
    base, config = model(), trial(modules_to_save=["norm"])
    extra = expected_extra_trainables(base, config, expected_modules(base, config.lora), load_tokenizer(config.base))
    assert extra.saved == {"model.norm": 32}
    peft = get_peft_model(base, lora_config(config, expected_modules(base, config.lora), extra))
    trained = [name for name, p in peft.named_parameters() if p.requires_grad and "lora_" not in name]
    assert trained == ["base_model.model.model.norm.modules_to_save.default.weight"]
    assert torch.equal(peft.get_parameter(trained[0]), torch.ones(32))
