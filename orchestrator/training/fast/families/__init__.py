"""Model families that the fast engine computes, one file each: data only.

To add a family, describe it in a new file and list it here. Do so only after `step/layer.py` computes all that the
family's decoder layer does: the eligibility check refuses every module and configuration field that is not listed.
"""

from collections.abc import Mapping

from orchestrator.training.fast.families.family import Family
from orchestrator.training.fast.families.gemma import GEMMA, GEMMA2, GEMMA3
from orchestrator.training.fast.families.gpt_oss import GPT_OSS
from orchestrator.training.fast.families.granite import GRANITE, GRANITE4
from orchestrator.training.fast.families.llama import LLAMA
from orchestrator.training.fast.families.ministral import MINISTRAL, MINISTRAL3
from orchestrator.training.fast.families.mistral import MISTRAL
from orchestrator.training.fast.families.mixtral import MIXTRAL
from orchestrator.training.fast.families.olmo import OLMO2, OLMO3, OLMOE
from orchestrator.training.fast.families.phi3 import PHI3
from orchestrator.training.fast.families.qwen2 import QWEN2
from orchestrator.training.fast.families.qwen3 import QWEN3, QWEN3_MOE
from orchestrator.training.fast.families.smollm3 import SMOLLM3

_FAMILIES = (
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT_OSS,
    GRANITE,
    GRANITE4,
    LLAMA,
    MINISTRAL,
    MINISTRAL3,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    OLMO3,
    OLMOE,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SMOLLM3,
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _FAMILIES}
"""`model_type` of a transformers configuration -> family."""
