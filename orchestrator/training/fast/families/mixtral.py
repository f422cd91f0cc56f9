"""Mixtral (arXiv 2401.04088): Mistral with experts."""

from dataclasses import replace

from orchestrator.training.fast.families.family import (
    EXPERT_FIELDS,
    EXPERT_HARMLESS_FIELDS,
    FIXED_FIELDS,
    HARMLESS_FIELDS,
    ExpertNames,
)
from orchestrator.training.fast.families.mistral import MISTRAL

MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    experts=ExpertNames(),
    used_fields=MISTRAL.used_fields | EXPERT_FIELDS,
    fixed_fields={**FIXED_FIELDS, "router_jitter_noise": (0.0,)},
    harmless_fields=HARMLESS_FIELDS | EXPERT_HARMLESS_FIELDS,
)
