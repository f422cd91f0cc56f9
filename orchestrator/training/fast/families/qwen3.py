"""Qwen3 (arXiv 2505.09388): Qwen2 without biases, with a norm of each query and key head; also with experts."""

from dataclasses import replace

from orchestrator.training.fast.families.family import (
    EXPERT_FIELDS,
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
    used_fields=QWEN3.used_fields | EXPERT_FIELDS | {"moe_intermediate_size", "norm_topk_prob", "use_sliding_window"},
    fixed_fields={**FIXED_FIELDS, "output_router_logits": (False,)},
    # Which layers have experts is seen from their modules.
    harmless_fields=HARMLESS_FIELDS | {"decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef"},
)
