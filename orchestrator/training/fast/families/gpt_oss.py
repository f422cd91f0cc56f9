"""gpt-oss (arXiv 2508.10925): experts with biases and a clamped activation, and a sink in the softmax of each head."""

from orchestrator.training.fast.families.family import (
    EXPERT_FIELDS,
    EXPERT_HARMLESS_FIELDS,
    FIXED_FIELDS,
    GROUPS,
    HARMLESS_FIELDS,
    USED_FIELDS,
    ExpertNames,
    Family,
)

GPT_OSS = Family(
    model_type="gpt_oss",
    groups=GROUPS[:2],
    experts=ExpertNames(
        router="mlp.router",
        other_modules=frozenset({"mlp"}),
        scores="chosen",
        is_transposed=True,
        has_biases=True,
    ),
    sinks="self_attn.sinks",
    norm_weight="float32",
    has_half_tables=True,
    activation="clamped_silu",
    other_modules=frozenset({"self_attn"}),
    used_fields=USED_FIELDS | EXPERT_FIELDS | {"attention_bias", "layer_types", "sliding_window"},
    fixed_fields={
        **FIXED_FIELDS,
        "swiglu_alpha": (1.702,),
        "swiglu_limit": (7.0,),
    },
    # `initial_context_length` and `experts_per_token` are in the published files; transformers reads neither.
    harmless_fields=HARMLESS_FIELDS | EXPERT_HARMLESS_FIELDS | {"experts_per_token", "initial_context_length"},
)
