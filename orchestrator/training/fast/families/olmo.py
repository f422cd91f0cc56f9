"""OLMo 2 (arXiv 2501.00656) and OLMo 3: norms after attention and MLP alone, and norms of all queries and all keys.

OLMo 3 has a window in most layers. OLMoE (arXiv 2409.02060) has experts, and norms before attention and MLP.
"""

from dataclasses import replace

from orchestrator.training.fast.families.family import (
    EXPERT_FIELDS,
    EXPERT_HARMLESS_FIELDS,
    FIXED_FIELDS,
    HARMLESS_FIELDS,
    USED_FIELDS,
    ExpertNames,
    Family,
    LayerNorms,
)

_NORMS = LayerNorms(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)

OLMO2 = Family(
    model_type="olmo2",
    norms=_NORMS,
    qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
    normalizes_all_heads=True,
    norm_weight="float32",
    has_float32_angles=True,
    used_fields=USED_FIELDS | {"attention_bias"},
)

OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    used_fields=OLMO2.used_fields | {"layer_types", "sliding_window"},
)

OLMOE = replace(
    OLMO2,
    model_type="olmoe",
    norms=LayerNorms(),
    norm_weight="plain",
    has_float32_angles=False,
    experts=ExpertNames(),
    used_fields=OLMO2.used_fields | EXPERT_FIELDS | {"norm_topk_prob"},
    fixed_fields={**FIXED_FIELDS, "clip_qkv": ()},
    harmless_fields=HARMLESS_FIELDS | EXPERT_HARMLESS_FIELDS,
)
