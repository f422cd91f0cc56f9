"""Families on a GPU: their kernels compute what transformers does, with heads as large as in published models."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import FAMILY_CASES
from transformers import AutoModelForCausalLM

from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.plan import parity
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.model.targets import expected_modules

pytestmark = pytest.mark.gpu

LARGE: dict[str, dict[str, Any]] = {
    "qwen3 with wide heads and biases, nf4": {"head_dim": 128},
    "phi3 with heads that are rotated in part, nf4": {"hidden_size": 384},  # heads of 96
    "gemma2": {"head_dim": 256},
    "gemma3_text with two rotary embeddings, nf4": {"head_dim": 256},
    "granite 4, nf4": {"hidden_size": 256},  # heads of 64
    "gemma with one key head": {"head_dim": 256},
    "olmo3": {"hidden_size": 320},  # heads of 80
}
"""Sizes of the heads in published models."""


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
