"""Llama, with or without biases on its linear layers."""

from orchestrator.training.fast.families.family import HARMLESS_FIELDS, USED_FIELDS, Family

LLAMA = Family(
    model_type="llama",
    used_fields=USED_FIELDS | {"attention_bias", "mlp_bias"},
    # `pretraining_tp` split products in earlier versions; transformers 5.23 does not read it.
    harmless_fields=HARMLESS_FIELDS | {"pretraining_tp"},
)
