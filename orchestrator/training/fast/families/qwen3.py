"""Qwen3 (arXiv 2505.09388): Qwen2 without biases, with a norm of each query and key head; also with experts."""

from dataclasses import replace

from orchestrator.training.fast.families.family import (
    EXPERT_FIELDS,
    EXPERT_HARMLESS_FIELDS,
    FIXED_FIELDS,
    HARMLESS_FIELDS,
    USED_FIELDS,
    ExpertNames,
    Family,
)
from orchestrator.training.fast.families.qwen2 import WINDOW_FIELDS

QWEN3 = Family(
    model_type="qwen3",
    qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
    used_fields=USED_FIELDS | WINDOW_FIELDS | {"attention_bias"},
)

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    experts=ExpertNames(),
    # transformers 5.23 reads no `layer_types` here: all layers have the same window.
    used_fields=QWEN3.used_fields - {"layer_types", "max_window_layers"}
    | EXPERT_FIELDS
    | {"moe_intermediate_size", "norm_topk_prob"},
    # Fields of Qwen3-Coder's files, which transformers does not read.
    fixed_fields={
        **FIXED_FIELDS,
        "qkv_bias": (False,),
        "shared_expert_intermediate_size": (0,),
        "use_qk_norm": (True,),
    },
    # Which layers have experts is seen from their modules.
    harmless_fields=HARMLESS_FIELDS
    | EXPERT_HARMLESS_FIELDS
    | {"decoder_sparse_step", "max_window_layers", "mlp_only_layers"},
)
