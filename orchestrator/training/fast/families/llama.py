"""Llama, with or without biases on its linear layers."""

from orchestrator.training.fast.families.family import (
    FIXED_FIELDS,
    HARMLESS_FIELDS,
    LAYER_MODULES,
    MODEL_MODULES,
    ROPE_TYPES,
    USED_FIELDS,
    Family,
)

LLAMA = Family(
    model_type="llama",
    model_modules=MODEL_MODULES,
    layer_modules=LAYER_MODULES,
    used_fields=USED_FIELDS | {"attention_bias", "mlp_bias"},
    fixed_fields=FIXED_FIELDS,
    # `pretraining_tp` split products in earlier versions; transformers 5.23 does not read it.
    harmless_fields=HARMLESS_FIELDS | {"pretraining_tp"},
    rope_types=ROPE_TYPES,
)
