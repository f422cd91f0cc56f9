"""Granite 3, a Llama with multipliers of embeddings, residual sums, attention scores and logits."""

from orchestrator.training.fast.families.family import USED_FIELDS, Family

GRANITE = Family(
    model_type="granite",
    used_fields=USED_FIELDS
    | {
        "attention_bias",
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "mlp_bias",
        "residual_multiplier",
    },
)
