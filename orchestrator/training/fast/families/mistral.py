"""Mistral, whose attention may have a sliding window."""

from orchestrator.training.fast.families.family import USED_FIELDS, Family

MISTRAL = Family(
    model_type="mistral",
    used_fields=USED_FIELDS | {"sliding_window"},
)
