"""Model families that the fast engine computes, one file each: data only.

To add a family, describe it in a new file and list it here. Do so only after `step/decoder.py` computes all that the
family's decoder layer does: the eligibility check refuses every module and configuration field that is not listed.
"""

from collections.abc import Mapping

from orchestrator.training.fast.families.family import Family
from orchestrator.training.fast.families.llama import LLAMA
from orchestrator.training.fast.families.mistral import MISTRAL
from orchestrator.training.fast.families.qwen2 import QWEN2

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2)}
"""`model_type` of a transformers configuration -> family."""
