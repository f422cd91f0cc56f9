"""Gemma (arXiv 2403.08295), Gemma 2 (arXiv 2408.00118) and Gemma 3 (arXiv 2503.19786), text only.

All multiply norms by 1 + w and embeddings by the square root of the hidden size, and have an MLP with GELU. Gemma 2
and 3 have norms before and after attention and MLP, and a window in most layers. Gemma 2 caps scores and logits; Gemma
3 has norms of query and key heads, and another rotary embedding in the layers with a window.
"""

from dataclasses import replace

from orchestrator.training.fast.families.family import FIXED_FIELDS, HARMLESS_FIELDS, USED_FIELDS, Family, LayerNorms

_NORMS = LayerNorms(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)

_USED_FIELDS = USED_FIELDS | {
    "attention_bias",
    "final_logit_softcapping",
    "layer_types",
    "query_pre_attn_scalar",
    "sliding_window",
}

# Left in config.json by earlier versions. transformers 5.23 reads `hidden_activation` and `layer_types`.
_HARMLESS_FIELDS = HARMLESS_FIELDS | {"cache_implementation", "hidden_act", "sliding_window_pattern"}

_FIXED_FIELDS = {name: values for name, values in FIXED_FIELDS.items() if name != "hidden_act"} | {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False,),
}

GEMMA = Family(
    model_type="gemma",
    norm_weight="plus_one",
    activation="gelu_tanh",
    scales_embedding=True,
    used_fields=USED_FIELDS | {"attention_bias"},
    # transformers 5.23 reads `hidden_act`, and takes "gelu" for the approximation by tanh.
    fixed_fields={**FIXED_FIELDS, "hidden_act": ("gelu_pytorch_tanh", "gelu"), "use_bidirectional_attention": (False,)},
    harmless_fields=HARMLESS_FIELDS | {"hidden_activation"},
)

GEMMA2 = Family(
    model_type="gemma2",
    norms=_NORMS,
    norm_weight="plus_one",
    activation="gelu_tanh",
    scales_embedding=True,
    used_fields=_USED_FIELDS | {"attn_logit_softcapping"},
    fixed_fields=_FIXED_FIELDS,
    harmless_fields=_HARMLESS_FIELDS,
)

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
    used_fields=_USED_FIELDS,
    # transformers 5.23 does not apply `attn_logit_softcapping` here.
    fixed_fields={**_FIXED_FIELDS, "attn_logit_softcapping": ()},
)
