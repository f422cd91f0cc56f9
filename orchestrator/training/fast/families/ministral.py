"""Ministral: Mistral with a sliding window in some layers (ministral), or with queries that grow with the position
(ministral3), which eligibility refuses where rows are long enough for it.
"""

from orchestrator.training.fast.families.family import USED_FIELDS, Family

MINISTRAL = Family(
    model_type="ministral",
    used_fields=USED_FIELDS | {"layer_types", "sliding_window"},
)

MINISTRAL3 = Family(
    model_type="ministral3",
    used_fields=USED_FIELDS | {"sliding_window"},
)
