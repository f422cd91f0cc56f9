"""A step is captured again where memory was short at first."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from family_cases import FAMILY_CASES
from transformers import AutoModelForCausalLM

from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import TABLE, Span, TokenizedRows
from orchestrator.training.model.targets import expected_modules

pytestmark = pytest.mark.gpu


def test_the_first_capture_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(deepcopy(FAMILY_CASES["olmo2"][0]), dtype=torch.bfloat16).eval()
    layers = adapted_layers(base, expected_modules(base, LoraSection()))
    adapters = Adapters(layers, 1, 16, torch.float32, torch.bfloat16, torch.device("cuda"))
    pool = torch.cuda.graph_pool_handle()
    engine = Engine(Decoder(base, torch.bfloat16, 64, keeps_base=True), adapters, "nothing", pool, on_gpu=True)
    ids = list(range(1, 61))
    span = Span(0, TokenizedRows([ids], [ids]), [0], dict.fromkeys(TABLE, 0.0) | {"rank": 16, "loss_weight": 1.0})
    expected, compute, failed = engine.step_once(span).losses, engine._compute, []

    def short_of_memory(*args: Any) -> torch.Tensor:
        values = compute(*args)
        if not failed and torch.cuda.is_current_stream_capturing():
            failed.append(True)
            raise torch.OutOfMemoryError
        return values

    monkeypatch.setattr(engine, "_compute", short_of_memory)
    assert engine.step([span]).read().losses == expected
    assert engine.step([span]).read().losses == expected
    assert failed
