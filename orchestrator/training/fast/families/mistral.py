"""Mistral, whose attention may have a sliding window. Eligibility refuses a window shorter than the longest row."""

from orchestrator.training.fast.families.family import (
    FIXED_FIELDS,
    HARMLESS_FIELDS,
    LAYER_MODULES,
    MODEL_MODULES,
    ROPE_TYPES,
    USED_FIELDS,
    Family,
)

MISTRAL = Family(
    model_type="mistral",
    model_modules=MODEL_MODULES,
    layer_modules=LAYER_MODULES,
    used_fields=USED_FIELDS | {"sliding_window"},
    fixed_fields=FIXED_FIELDS,
    harmless_fields=HARMLESS_FIELDS,
    rope_types=ROPE_TYPES,
)
