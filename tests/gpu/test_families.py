"""Families on a GPU: their kernels compute what transformers does, with heads as large as in published models."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from family_cases import FAMILY_CASES, LARGE
from transformers import AutoModelForCausalLM

from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.plan import parity
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.model.targets import expected_modules

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_kernels_compute_what_transformers_does(name: str) -> None:
    torch.manual_seed(0)
    config = deepcopy(FAMILY_CASES[name][0])
    for field, value in LARGE.get(name, {}).items():
        setattr(config, field, value)
    if name.startswith("phi3"):
        config.rope_parameters |= {"short_factor": [1.5] * 36, "long_factor": [4.0] * 36}
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    for parameter in base.parameters():
        parameter.requires_grad_(False)
        parameter.data += 0.02 * torch.randn_like(parameter)
    layers = adapted_layers(base, expected_modules(base, LoraSection()))
    adapters = Adapters(layers, 2, 16, torch.float32, torch.bfloat16, torch.device("cuda"))
    engine = Engine(Decoder(base, torch.bfloat16, 64, keeps_base=True), adapters, "nothing", None, on_gpu=True)
    ids = np.random.default_rng(0).integers(1, 90, 60).tolist()
    parity.require_parity(base, engine, TokenizedRows([ids], [ids]))
