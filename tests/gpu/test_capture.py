"""Steps as CUDA graphs: with experts, and where memory was short at first."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from family_cases import FAMILY_CASES
from transformers import AutoModelForCausalLM

from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.sizes import Recompute
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine, EvaluationBatch
from orchestrator.training.fast.step.flat_batch import TABLE, Span, TokenizedRows
from orchestrator.training.model.targets import expected_modules

pytestmark = pytest.mark.gpu


def open_engine(name: str, recompute: Recompute = "nothing") -> Engine:
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(deepcopy(FAMILY_CASES[name][0]), dtype=torch.bfloat16).eval()
    layers = adapted_layers(base, expected_modules(base, LoraSection()))
    adapters = Adapters(layers, 1, 16, torch.float32, torch.bfloat16, torch.device("cuda"))
    for key, matrix in adapters.matrices(0, 16, adapters.weights):
        matrix.normal_(std=0.1 if key.endswith("lora_A") else 0.02)
    pool = torch.cuda.graph_pool_handle()
    return Engine(Decoder(base, torch.bfloat16, 64, keeps_base=True), adapters, recompute, pool, on_gpu=True)


def span_of(ids: list[int]) -> Span:
    table = dict.fromkeys(TABLE, 0.0) | {"rank": 16, "scale": 1.0, "keep_scale": 1.0, "loss_weight": 1.0}
    return Span(0, TokenizedRows([ids], [ids]), [0], table)


@pytest.mark.parametrize("recompute", ["nothing", "layers"])
@pytest.mark.parametrize("name", [name for name in FAMILY_CASES if "moe" in name or "oss" in name])
def test_a_graph_sends_each_row_to_its_own_experts(name: str, recompute: Recompute) -> None:
    engine = open_engine(name, recompute)
    for first in (1, 20, 7):  # the second and the third replay the graph of the first
        span = span_of([first + index * index % 60 for index in range(60)])
        engine.adapters.gradients.zero_()
        losses = engine.step([span]).read().losses
        replayed = engine.adapters.gradients.clone()
        evaluated = engine.evaluate([EvaluationBatch(engine, 0, span.rows, span.table)])[0].losses
        engine.adapters.gradients.zero_()
        assert engine.step_once(span).losses == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(engine.adapters.gradients, replayed, rtol=1e-3, atol=1e-4)
        assert evaluated == pytest.approx(losses, rel=1e-3)


def test_a_graph_reads_the_scales_of_layers_that_it_was_not_captured_with() -> None:
    engine, span = open_engine("olmo2"), span_of([*range(1, 61)])
    plain = engine.step([span]).read().losses
    names = [layer.name for group in engine.adapters.groups if group is not None for layer in group.layers]
    engine.adapters.set_patterns(0, {}, {name: 0.2 + at for at, name in enumerate(names)})
    losses = engine.step([span]).read().losses
    assert losses != pytest.approx(plain, rel=1e-4)  # a graph gives the same bits for the same input
    assert engine.step_once(span).losses == pytest.approx(losses, rel=1e-5)


def test_the_first_capture_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, span = open_engine("olmo2"), span_of([*range(1, 61)])
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
