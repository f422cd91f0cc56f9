"""Which trials the fast engine can hold: by their configuration, their base and the kernels' limits."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from family_cases import MULTIMODAL_CASES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from orchestrator.base import model_class
from orchestrator.spec import TrialConfig
from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.families.family import Family
from orchestrator.training.fast.families.settings import layer_kinds
from orchestrator.training.fast.families.text_model import text_model
from orchestrator.training.fast.plan.eligibility import (
    unknown_field,
    unknown_module,
    unsupported_reason,
    unsupported_reason_by_shape,
    unsupported_shape,
)
from orchestrator.training.fast.step.decoder import Decoder

pytestmark = pytest.mark.usefixtures("on_cpu")

LONGEST = 12
SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
MakeConfig = Callable[..., TrialConfig]


def model_of(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**SIZES), None),
        (Qwen2Config(**SIZES), None),
        (MistralConfig(**SIZES, sliding_window=LONGEST), None),
        (
            GPT2Config(n_embd=32, n_layer=1, n_head=2),
            f"model type 'gpt2' (supported: {', '.join(FAMILIES)})",
        ),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act 'gelu' (supported: 'silu')"),
        (MistralConfig(**SIZES, sliding_window=8), None),
        (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0), None),
        (LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), None),
        (
            LlamaConfig(
                **SIZES,
                max_position_embeddings=63,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            ),
            "RoPE type 'dynamic' with rows of up to 64 tokens: beyond 63 the longest row changes angles",
        ),
        (Phi3Config(**SIZES, pad_token_id=0, original_max_position_embeddings=64, rope_parameters=LONGROPE), None),
        (
            Phi3Config(**SIZES, pad_token_id=0, original_max_position_embeddings=63, rope_parameters=LONGROPE),
            "RoPE type 'longrope' with rows of up to 64 tokens: beyond 63 the longest row changes angles",
        ),
        (
            Ministral3Config(
                **SIZES,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "llama_4_scaling_beta": 0.1,
                    "original_max_position_embeddings": 63,
                },
            ),
            "llama_4_scaling_beta with rows of up to 64 tokens: it scales queries beyond 63",
        ),
        (Gemma2Config(**SIZES, hidden_activation="silu"), "hidden_activation 'silu' (supported: 'gelu_pytorch_tanh')"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}),
            "RoPE type 'proportional'",
        ),
        (LlamaConfig(**SIZES, attention_dropout=0.1), "attention_dropout 0.1 (supported: 0.0)"),
        (
            LlamaConfig(**SIZES, logit_scale=0.5),
            "configuration field logit_scale, which is not listed for model type 'llama'",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_requirements_on_the_base(trial: MakeConfig, config: PreTrainedConfig, reason: str | None) -> None:
    model = model_of(config)
    assert unsupported_reason(trial(), model, LONGEST) == reason


def test_answers_count_as_part_of_a_row(trial: MakeConfig) -> None:
    """Where angles depend on the longest row, an answer must not go beyond the limit either."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = model_of(LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=rope))
    asks = trial(evaluation={"metrics": ["exact_match"], "max_new_tokens": 64})
    assert unsupported_reason(trial(), model, LONGEST) is None
    reason = unsupported_reason(asks, model, LONGEST)
    assert reason is not None
    assert reason.startswith("RoPE type 'dynamic' with rows of up to 128 tokens: beyond 64")


@pytest.mark.parametrize("name", MULTIMODAL_CASES)
def test_the_text_decoder_of_a_multimodal_base_is_accepted(trial: MakeConfig, name: str) -> None:
    config = deepcopy(MULTIMODAL_CASES[name][0])
    model = model_class(config).from_config(config)
    assert unsupported_reason(trial(), model, LONGEST) is None
    text_model(model).module.layers[1].mlp.other_norm = torch.nn.RMSNorm(4)
    assert "module mlp.other_norm in layer 1, which is not listed" in str(unsupported_reason(trial(), model, LONGEST))


def test_a_head_with_a_bias_is_refused(trial: MakeConfig) -> None:
    model = model_of(LlamaConfig(**SIZES))
    model.lm_head = torch.nn.Linear(32, 90, device="meta")
    assert unsupported_reason(trial(), model, LONGEST) == "a bias on the LM head"


def test_a_layer_of_another_dtype_is_refused(trial: MakeConfig) -> None:
    model = model_of(LlamaConfig(**SIZES))
    model.model.layers[0].mlp.up_proj.half()
    assert unsupported_reason(trial(), model, LONGEST) == "mlp.up_proj as a Linear of torch.float16"


def test_a_base_on_two_devices_is_refused(trial: MakeConfig) -> None:
    model = model_of(LlamaConfig(**SIZES))
    model.model.norm = torch.nn.RMSNorm(32)
    assert unsupported_reason(trial(), model, LONGEST) == "a base on 2 devices"


def test_an_adapter_on_another_module_is_refused(trial: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FAMILIES["llama"]
    with_router = replace(llama, other_modules=llama.other_modules | {"mlp.router"})
    monkeypatch.setitem(FAMILIES, "llama", with_router)  # type: ignore[arg-type]
    model = model_of(LlamaConfig(**SIZES))
    model.model.layers[0].mlp.router = torch.nn.Linear(32, 4, bias=False, device="meta")
    assert unsupported_reason(trial(), model, LONGEST) == "an adapter on router"
    assert unsupported_reason(trial(lora={"target_modules": ["q_proj", "mlp.up_proj"]}), model, LONGEST) is None


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"base": {"compute_dtype": "bfloat16"}}, None),
        ({"base": {"compute_dtype": "bfloat16"}, "training": {"precision": "bf16"}}, None),
        ({"training": {"precision": "bf16"}}, "base.compute_dtype float32 under precision bf16"),
        ({"base": {"compute_dtype": "float16"}}, "base.compute_dtype float16 under precision none"),
        ({"lora": {"bias": "all"}}, "lora.bias all"),
        ({"training": {"optimizer": "sgd"}}, "training.optimizer sgd"),
    ],
    ids=str,
)
def test_requirements_on_the_trial(trial: MakeConfig, sections: dict[str, Any], reason: str | None) -> None:
    model = model_of(LlamaConfig(**SIZES))
    assert unsupported_reason(trial(**sections), model, LONGEST) == reason


# Families


def small_model(model_type: str, num_layers: int = 2) -> Any:
    sizes = SIZES | {"num_hidden_layers": num_layers, "pad_token_id": 0, "head_dim": 16}
    return model_of(default_config(model_type, **sizes))


def default_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """Return a configuration with transformers' defaults, except those with which a base is a hybrid."""
    if model_type == "granitemoehybrid":
        dense = {"num_local_experts": 0, "position_embedding_type": "rope", "shared_intermediate_size": 48}
        fields = dense | {"mamba_n_heads": 4} | fields
        fields["layer_types"] = ["full_attention"] * fields.get("num_hidden_layers", 32)
    return AutoConfig.for_model(model_type, **fields)


GRANITE_4_MICRO: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "attention_multiplier": 0.015625, "embedding_multiplier": 12,
    "hidden_act": "silu", "hidden_size": 2560, "init_method": "mup", "initializer_range": 0.1,
    "intermediate_size": 8192, "layer_types": ["attention"] * 40, "logits_scaling": 10, "mamba_chunk_size": 256,
    "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 256, "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_n_heads": 80, "mamba_proj_bias": False, "max_position_embeddings": 131072,
    "normalization_function": "rmsnorm", "num_attention_heads": 40, "num_experts_per_tok": 0, "num_hidden_layers": 40,
    "num_key_value_heads": 8, "num_local_experts": 0, "output_router_logits": False, "position_embedding_type": "rope",
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1e7,
    "router_aux_loss_coef": 0.01, "shared_intermediate_size": 8192, "tie_word_embeddings": True, "vocab_size": 100352,
}  # fmt: skip
"""Fields of a published dense base. Sizes of Mamba layers, which it does not have, are made to fit each other."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "phi3": {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1,
             "interpolate_factor": 1, "pad_token_id": 0},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    "gemma3_text": {"sliding_window_pattern": 6, "cache_implementation": "hybrid"},
    "gemma": {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "rope_scaling": None},
    "granitemoehybrid": GRANITE_4_MICRO,
    "smollm3": {"pretraining_tp": 2, "max_window_layers": 28, "use_sliding_window": False},
    "llama": {"pretraining_tp": 1, "unk_token_id": 0},
    # Qwen3-Coder-30B-A3B, and gpt-oss-20b.
    "qwen3_moe": {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0, "max_window_layers": 28,
                  "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "use_sliding_window": False},
    "gpt_oss": {"experts_per_token": 4, "initial_context_length": 4096, "swiglu_limit": 7.0},
}  # fmt: skip
"""Fields of published configuration files that transformers does not read."""


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_configurations_are_accepted(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **PUBLISHED[model_type])
    assert unknown_field(config, FAMILIES[model_type]) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_local_experts": 4}, "num_local_experts 4 (supported: 0)"),
        ({"layer_types": ["mamba", "attention"]}, "layers of type 'linear_attention'"),
        ({"position_embedding_type": "learned"}, "position_embedding_type 'learned' (supported: 'nope' or 'rope')"),
    ],
    ids=str,
)
def test_hybrids_of_granite_4_are_refused(fields: dict[str, Any], reason: str) -> None:
    sizes = SIZES | {"num_hidden_layers": 2, "pad_token_id": 0, "mamba_n_heads": 4, "position_embedding_type": "rope"}
    dense = {"num_local_experts": 0, "layer_types": ["attention"] * 2}
    config = AutoConfig.for_model("granitemoehybrid", **sizes | dense | fields)
    assert unsupported_shape(model_of(config), LONGEST) == reason


@pytest.mark.parametrize("model_type", ["olmo3", "gemma3_text"])
def test_one_rotary_embedding_beside_those_of_types_of_layers(model_type: str) -> None:
    """transformers keeps the keys of a flat dictionary beside those that it derives for each type of layer."""
    flat = {"rope_type": "default", "rope_theta": 1e4}
    config = AutoConfig.for_model(model_type, **SIZES | {"pad_token_id": 0, "head_dim": 16}, rope_parameters=flat)
    assert {kind.rope for kind in layer_kinds(config)} == set(config.layer_types)
    Decoder(AutoModelForCausalLM.from_config(config), torch.float32, 64, keeps_base=True)


def test_more_entries_than_layers() -> None:
    config = AutoConfig.for_model("smollm3", **SIZES | {"pad_token_id": 0}, no_rope_layers=[0, 1, 1, 1])
    assert [kind.is_rotated for kind in layer_kinds(config)] == [False]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_of_transformers_are_accepted(model_type: str) -> None:
    """All fields and modules of the installed transformers release are listed."""
    assert FAMILIES[model_type].model_type == model_type
    assert unknown_field(default_config(model_type), FAMILIES[model_type]) is None
    assert unsupported_shape(small_model(model_type), LONGEST) is None


def test_the_embedded_base_is_accepted(base: Any) -> None:
    assert unsupported_shape(base, LONGEST) is None


def test_leftovers_in_config_files_are_accepted() -> None:
    """Published configurations hold fields of earlier releases and of other tools."""
    leftovers = {"is_llama_config": True, "rope_interleaved": False, "torchscript": False, "unsloth_fixed": True}
    config = LlamaConfig(**SIZES, **leftovers, not_set=None)
    assert unsupported_shape(model_of(config), LONGEST) is None
    config = Qwen2Config(**SIZES, use_mrope=False, is_decoder=False, tie_encoder_decoder=False)
    assert unsupported_shape(model_of(config), LONGEST) is None


class WithoutModule(Family):
    """A family that does not list one of its layers' modules."""

    def __init__(self, family: Family, name: str) -> None:
        super().__init__(**vars(family))
        object.__setattr__(self, "name", name)

    def layer_modules(self, layer: Any) -> frozenset[str]:
        return super().layer_modules(layer) - {vars(self)["name"]}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_listed_module_is_needed(model_type: str) -> None:
    """Without its entry in the family, a module is unknown; without the module, the model is incomplete."""
    family, model = FAMILIES[model_type], small_model(model_type)
    for name in family.layer_modules(model.model.layers[0]):
        assert unknown_module(model, text_model(model), WithoutModule(family, name)) == (
            f"module {name} in layer 0, which is not listed for model type {model_type!r}"
        )
        longer = replace(family, other_modules=family.other_modules | {"self_attn.more"})
        assert unknown_module(model, text_model(model), longer) == "layer 0 without module self_attn.more"
    for name in family.model_modules:
        shorter = replace(family, model_modules=family.model_modules - {name})
        assert unknown_module(model, text_model(model), shorter) == (
            f"module {name} in the model, which is not listed for model type {model_type!r}"
        )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_module_that_no_list_has_is_refused(model_type: str) -> None:
    """In any place of any layer, and outside the layers."""
    mlp = "shared_mlp" if model_type == "granitemoehybrid" else "mlp"
    for path in ("", ".self_attn", f".{mlp}"):
        model = small_model(model_type)
        model.get_submodule(f"model.layers.1{path}").other_norm = torch.nn.RMSNorm(4)
        name = f"{path}.other_norm".lstrip(".")
        reason = f"module {name} in layer 1, which is not listed for model type {model_type!r}"
        assert unsupported_shape(model, LONGEST) == reason
    model = small_model(model_type)
    model.model.embed_norm = torch.nn.RMSNorm(4)
    reason = f"module model.embed_norm in the model, which is not listed for model type {model_type!r}"
    assert unsupported_shape(model, LONGEST) == reason


def test_a_parameter_that_the_decoder_does_not_read_is_refused() -> None:
    model = small_model("llama")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(2))
    assert unsupported_shape(model, LONGEST) == "parameter self_attn.sinks in layer 1, which its decoder does not read"
    model = small_model("llama")
    model.model.layers[1].input_layernorm.bias = torch.nn.Parameter(torch.zeros(32))
    reason = "parameter input_layernorm.bias in layer 1, which its decoder does not read"
    assert unsupported_shape(model, LONGEST) == reason


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_that_no_list_has_is_refused(model_type: str) -> None:
    family, config = FAMILIES[model_type], default_config(model_type)
    for name in [name for name, value in vars(config).items() if value is not None and not name.startswith("_")]:
        shorter = replace(
            family,
            used_fields=family.used_fields - {name},
            fixed_fields={each: values for each, values in family.fixed_fields.items() if each != name},
            harmless_fields=family.harmless_fields - {name},
        )
        reason = f"configuration field {name}, which is not listed for model type {model_type!r}"
        assert unknown_field(config, shorter) == reason
    config.residual_scale = 0.5
    reason = f"configuration field residual_scale, which is not listed for model type {model_type!r}"
    assert unknown_field(config, family) == reason


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_fixed_field_allows_its_values_alone(model_type: str) -> None:
    family = FAMILIES[model_type]
    for name, values in family.fixed_fields.items():
        config = default_config(model_type)
        for value in values:
            vars(config)[name] = value  # transformers validates assignments
            assert unknown_field(config, family) is None
        vars(config)[name] = "other"
        assert unknown_field(config, family) == f"{name} 'other' (supported: {' or '.join(map(repr, values))})"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_lists_do_not_overlap(model_type: str) -> None:
    family = FAMILIES[model_type]
    lists = [family.used_fields, frozenset(family.fixed_fields), family.harmless_fields]
    assert sum(map(len, lists)) == len(frozenset.union(*lists))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_shapes_are_those_of_the_model(model_type: str) -> None:
    model = small_model(model_type, num_layers=1)
    layer = {name.rpartition(".")[2]: module for name, module in model.model.layers[0].named_modules()}
    linears = {
        name: (each.in_features, each.out_features)
        for name, each in layer.items()
        if hasattr(each, "weight") and isinstance(each, torch.nn.Linear)
    }
    shape = BaseShape.of(model.config)
    assert shape.linears == linears
    experts = [each for each in model.model.layers[0].parameters() if each.ndim == 3]
    assert shape.num_linear_weights == sum(i * o for i, o in linears.values()) + sum(each.numel() for each in experts)


@pytest.mark.parametrize(
    ("capability", "reason"), [((9, 0), None), ((10, 3), None), ((8, 9), "capability"), ((12, 0), "capability")]
)
def test_experts_need_grouped_products(
    trial: Callable[..., TrialConfig], monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    shape = BaseShape.of(default_config("mixtral", hidden_size=512, intermediate_size=48))
    config = trial(base={"compute_dtype": "bfloat16"}, training={"precision": "bf16"})
    found = unsupported_reason_by_shape(config, shape, (), 64, on_gpu=True)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"rank": 256}, None),
        ({"rank": 257}, "a rank over 256 on a GPU"),
        ({"rank": 8, "rank_pattern": {"v_proj": 257}}, "a rank over 256 on a GPU"),
        ({"rank": 257, "rank_pattern": {"[qv]_proj": 256}}, None),
    ],
    ids=str,
)
def test_on_a_gpu_no_layer_has_a_rank_over_256(
    trial: Callable[..., TrialConfig], lora: dict[str, Any], reason: str | None
) -> None:
    shape = BaseShape.of(LlamaConfig(**SIZES))
    config = trial(base={"compute_dtype": "bfloat16"}, training={"precision": "bf16"}, lora=lora)
    names = [f"model.layers.0.self_attn.{leaf}" for leaf in ("q_proj", "v_proj")]
    assert unsupported_reason_by_shape(config, shape, names, 64, on_gpu=True) == reason


def test_adapters_of_experts_are_counted(trial: Callable[..., TrialConfig]) -> None:
    """128 experts of 6,400 features are 629 million weights in 48 layers at rank 16."""
    fields = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_hidden_layers": 48}
    shape = BaseShape.of(default_config("qwen3_moe", **fields, head_dim=128))
    names = [
        f"model.layers.{index}.mlp.experts.{leaf}" for index in range(48) for leaf in ("gate_up_proj", "down_proj")
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        reasons = []
        for rank in (32, 64):
            on_gpu = {"base": {"compute_dtype": "bfloat16"}, "training": {"precision": "bf16"}}
            config = trial(**on_gpu, lora={"rank": rank})
            reasons.append(unsupported_reason_by_shape(config, shape, names, 64, on_gpu=True))
    assert reasons == [None, "tensors of 2**31 elements and more"]


def test_sizes_of_experts(trial: Callable[..., TrialConfig]) -> None:
    odd = BaseShape.of(default_config("mixtral", hidden_size=64, intermediate_size=36))
    assert "experts of 64 and 36 features" in str(unsupported_reason_by_shape(trial(), odd, (), 64, on_gpu=False))
    # Mixtral-8x22B: an expert's rows of all tokens are one tensor.
    large = BaseShape.of(default_config("mixtral", hidden_size=6144, intermediate_size=16384))
    config = trial(base={"compute_dtype": "bfloat16"}, training={"precision": "bf16"})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        reasons = [unsupported_reason_by_shape(config, large, (), longest, on_gpu=True) for longest in (16_384, 40_000)]
    assert reasons == [None, "tensors of 2**31 elements and more"]
