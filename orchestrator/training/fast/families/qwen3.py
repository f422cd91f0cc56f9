"""Qwen3 (arXiv 2505.09388): Qwen2 without biases, with a norm of each query and key head."""

from orchestrator.training.fast.families.family import USED_FIELDS, Family
from orchestrator.training.fast.families.qwen2 import WINDOW_FIELDS

QWEN3 = Family(
    model_type="qwen3",
    qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
    used_fields=USED_FIELDS | WINDOW_FIELDS | {"attention_bias"},
)
