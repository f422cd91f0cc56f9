"""Adapters of experts against PEFT and autograd, and slots that step together against each slot alone."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import FAMILY_CASES
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from orchestrator.adapters.expert_updates import apply_by_expert
from orchestrator.base import load_base, share_modules
from orchestrator.spec.sections import BaseSection, LoraSection
from orchestrator.training.fast.sizes import Recompute
from orchestrator.training.fast.step import expert_adapters
from orchestrator.training.fast.step.adapters import Adapters, lora_parameters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine, EvaluationBatch
from orchestrator.training.fast.step.expert_adapters import grouped_product, grouped_sum
from orchestrator.training.fast.step.flat_batch import Span, TokenizedRows
from orchestrator.training.model.targets import adapted_names, expected_experts, expected_modules

pytestmark = pytest.mark.usefixtures("on_cpu")

MakeRows = Callable[..., TokenizedRows]
MakeTable = Callable[..., dict[str, float]]

CASES = [
    name
    for name, (config, _) in FAMILY_CASES.items()
    if config.model_type in ("mixtral", "olmoe", "gpt_oss", "qwen3_moe")
]
LENGTHS = (5, 19, 2, 11)
STACK = 8
TARGETS = (["q_proj", "experts"], ["experts.down_proj"], ["experts.gate_up_proj"])


def open_base(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    config, quantization = FAMILY_CASES[name]
    model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return load_base(BaseSection(model=str(folder), quantization=quantization, compute_dtype="float32"))


def peft_model(base: Any, lora: LoraSection) -> Any:
    """Build the model of PEFT alone, with random matrices."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=sorted(expected_modules(base, lora)),
        target_parameters=sorted(expected_experts(base, lora)),
        init_lora_weights=False,
    )
    model = get_peft_model(share_modules(base), config)
    apply_by_expert(model)
    for parameter in lora_parameters(model).values():
        parameter.data = 0.3 * torch.randn_like(parameter, dtype=torch.float32)
    return model


def loss_of(model: Any, rows: TokenizedRows) -> torch.Tensor:
    """Return the mean loss of a token."""
    total = torch.zeros(())
    for index in range(len(rows)):
        ids, targets = (torch.from_numpy(part(index)).long() for part in (rows.ids, rows.targets))
        total = total + cross_entropy(model(input_ids=ids[None]).logits[0], targets, reduction="sum")
    return total / rows.num_targets(range(len(rows)))


def open_engine(base: Any, lora: LoraSection, num_slots: int = 1, recompute: Recompute = "nothing") -> Engine:
    groups = adapted_layers(base, adapted_names(base, lora))
    adapters = Adapters(groups, num_slots, STACK, torch.float32, torch.float32, torch.device("cpu"))
    return Engine(Decoder(base, torch.float32, max(LENGTHS), True), adapters, recompute, None, on_gpu=False)


def load(engine: Engine, slot: int, rank: int, parameters: dict[str, torch.Tensor]) -> None:
    for name, matrix in engine.adapters.matrices(slot, rank, engine.adapters.weights):
        matrix.copy_(parameters[name].detach().view(matrix.shape))


def gradients(engine: Engine, slot: int, rank: int) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in engine.adapters.matrices(slot, rank, engine.adapters.gradients)}


@pytest.mark.parametrize("recompute", ["nothing", "elementwise", "layers"])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_peft(
    name: str, targets: list[str], recompute: Recompute, tmp_path: Path, make_rows: MakeRows, make_table: MakeTable
) -> None:
    base, lora = open_base(name, tmp_path), LoraSection(rank=4, alpha=12, dropout=0, target_modules=targets)
    peft, engine = peft_model(base, lora), open_engine(base, lora, recompute=recompute)
    parameters = lora_parameters(peft)
    load(engine, 0, 4, parameters)
    rows = make_rows(*LENGTHS)
    expected = loss_of(peft, rows)
    expected.backward()
    table = make_table(0.0, scale=3.0, applies=0, rank=4, loss_weight=1 / rows.num_targets(range(len(rows))))
    (loss,) = engine.step([Span(0, rows, range(len(rows)), table)]).read().losses
    assert loss == pytest.approx(float(expected), rel=1e-5)
    found = gradients(engine, 0, 4)
    assert found.keys() == parameters.keys()
    for key, gradient in found.items():
        exact = parameters[key].grad
        assert (gradient - exact.view(gradient.shape)).norm() <= 1e-4 * exact.norm(), key
    (scores,) = engine.evaluate([EvaluationBatch(engine, 0, rows, table)])
    assert scores.loss == pytest.approx(float(expected), rel=1e-5)
