"""Adapters of experts against PEFT and autograd, and slots that step together against each slot alone."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_cases import FAMILY_CASES
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.adapters.expert_updates import apply_by_expert
from orchestrator.base import load_base, share_modules
from orchestrator.spec.sections import BaseSection, LoraSection
from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.plan.memory import converted_at_use
from orchestrator.training.fast.sizes import Recompute
from orchestrator.training.fast.step import expert_adapters
from orchestrator.training.fast.step.adapters import NO_DROPOUT, AdaptedLayer, Adapters, lora_parameters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine, EvaluationBatch
from orchestrator.training.fast.step.expert_adapters import ExpertAdapters, grouped_product, grouped_sum
from orchestrator.training.fast.step.flat_batch import Span, TokenizedRows
from orchestrator.training.model.targets import adapted_names, expected_experts, expected_modules

pytestmark = pytest.mark.usefixtures("on_cpu")

MakeRows = Callable[..., TokenizedRows]
MakeTable = Callable[..., dict[str, float]]

CASES = [name for name, (config, _) in FAMILY_CASES.items() if FAMILIES[config.model_type].experts is not None]
LENGTHS = (5, 19, 2, 11)
STACK, EXPERT_STACK = 16, 8
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


def open_engine(
    base: Any, lora: LoraSection, num_slots: int = 1, recompute: Recompute = "nothing", eight_bit: bool = False
) -> Engine:
    groups, cpu = adapted_layers(base, adapted_names(base, lora)), torch.device("cpu")
    adapters = Adapters(groups, num_slots, STACK, torch.float32, torch.float32, cpu, eight_bit, EXPERT_STACK)
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
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(engine, 0, 4)
    assert found.keys() == parameters.keys()
    for key, gradient in found.items():
        exact = parameters[key].grad
        assert (gradient - exact.view(gradient.shape)).norm() <= 1e-4 * exact.norm(), key
    (scores,) = engine.evaluate([EvaluationBatch(engine, 0, rows, table)])
    assert scores.loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["32 bits", "8 bits"])
def test_slots_that_step_together_are_as_each_alone(
    optimizer: str, tmp_path: Path, make_rows: MakeRows, make_table: MakeTable
) -> None:
    """Slots of another rank, with other rows, and one without adapters of experts."""
    base, lora = open_base("qwen3_moe", tmp_path), LoraSection(dropout=0, target_modules=["q_proj", "experts"])
    eight_bit = optimizer == "8 bits"
    joint = open_engine(base, lora, 3, eight_bit=eight_bit)
    alone = [open_engine(base, lora, eight_bit=eight_bit) for _ in range(3)]
    ranks, rows = (4, 8, 16), [make_rows(*LENGTHS, seed=1), make_rows(7, 18, seed=2), make_rows(12, seed=3)]
    tables = [
        make_table(rank=rank, scale=scale, learning_rate=1e-2)
        for rank, scale in zip(ranks, (1.0, 2.5, 4.0), strict=True)
    ]
    for slot, engine in enumerate(alone):
        for name, matrix in engine.adapters.matrices(0, ranks[slot], engine.adapters.weights):
            if slot < 2 or ".experts." not in name:
                matrix.copy_(0.3 * torch.randn(matrix.shape))
        joint.adapters.weights[slot] = engine.adapters.weights[0]
    for _ in range(3):
        # The spans are in the opposite order of the slots.
        together = joint.step(
            [Span(slot, rows[slot], range(len(rows[slot])), tables[slot]) for slot in (2, 1, 0)]
        ).read()
        for slot, engine in enumerate(alone):
            metrics = engine.step([Span(0, rows[slot], range(len(rows[slot])), tables[slot])]).read()
            assert together.losses[slot] == pytest.approx(metrics.losses[0], rel=1e-5)
            assert together.norms[slot] == pytest.approx(metrics.norms[0], rel=1e-4)
    for slot, engine in enumerate(alone):
        found, expected = (
            dict(each)
            for each in (
                joint.adapters.matrices(slot, ranks[slot], joint.adapters.weights),
                engine.adapters.matrices(0, ranks[slot], engine.adapters.weights),
            )
        )
        for name, matrix in expected.items():
            assert matrix.any() == (slot < 2 or ".experts." not in name)
            assert (found[name] - matrix).norm() <= 1e-3 * matrix.norm(), name


def test_a_slot_without_a_finite_gradient_leaves_the_others_alone(
    tmp_path: Path, make_rows: MakeRows, make_table: MakeTable
) -> None:
    base, lora = open_base("qwen3_moe", tmp_path), LoraSection(dropout=0, target_modules=["experts"])
    engine, rows = open_engine(base, lora, 2), make_rows(9, 12)
    for slot in range(2):
        for _, matrix in engine.adapters.matrices(slot, 4, engine.adapters.weights):
            matrix.copy_(0.3 * torch.randn(matrix.shape))
    tables = [make_table(rank=4, applies=0, loss_weight=weight) for weight in (torch.inf, 0.1)]
    engine.step([Span(slot, rows, [0, 1], tables[slot]) for slot in range(2)]).read()
    assert not engine.adapters.gradients[0].isfinite().all()
    assert engine.adapters.gradients[1].isfinite().all()
    assert engine.adapters.gradients[1].any()


@pytest.mark.parametrize("most", [4, 1023])
def test_sums_of_groups_without_rows_are_zero_on_any_device(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves_other_values(x: torch.Tensor, y: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        counts = torch.diff(offs, prepend=offs.new_zeros(1))
        return torch.nn.functional.grouped_mm(x, y, offs=offs).masked_fill_((counts == 0)[:, None, None], torch.nan)

    monkeypatch.setattr(expert_adapters, "MAX_GROUPS", most)
    monkeypatch.setattr(expert_adapters, "F", SimpleNamespace(grouped_mm=leaves_other_values))
    counts = torch.tensor([0, 3, 1, 0, 5, 0])
    sums = grouped_sum(torch.ones(9, 16), torch.ones(9, 8), counts.cumsum(0).int())
    assert torch.equal(sums, counts[:, None, None].expand(6, 16, 8).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_groups", [3, 4, 5, 12])
def test_products_of_more_groups_than_the_most(
    num_groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_adapters, "MAX_GROUPS", 4)
    torch.manual_seed(0)
    counts = [0, 3, 1, 0, 5, 2, 0, 0, 1, 4, 2, 0][:num_groups]
    ends = torch.tensor(counts).cumsum(0).int()
    x, y = (torch.randn(sum(counts), features, dtype=dtype) for features in (16, 8))
    matrices = torch.randn(num_groups, 16, 8, dtype=dtype)
    parts = list(zip(x.split(counts), y.split(counts), matrices, strict=True))
    product = torch.cat([rows @ matrix for rows, _, matrix in parts])
    torch.testing.assert_close(grouped_product(x, matrices, ends), product)
    sums = torch.stack([left.mT @ right for left, right, _ in parts])
    torch.testing.assert_close(grouped_sum(x, y, ends), sums)


class PeakBytes(TorchDispatchMode):
    """Measures the bytes of tensors that are made within."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        known = {each.untyped_storage()._cdata for each in arguments if isinstance(each, torch.Tensor)}
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and (storage := result.untyped_storage())._cdata not in known:
            self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return result


@pytest.mark.parametrize("most", [7, 1023])
def test_a_backward_takes_the_memory_that_is_predicted(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_adapters, "MAX_GROUPS", most)
    layer, cpu, num_slots = AdaptedLayer("experts", NO_DROPOUT, 512, 0, 256, num_matrices=4), torch.device("cpu"), 2
    adapters = Adapters([[layer]], num_slots, 16, torch.float32, torch.bfloat16, cpu, expert_rank=8)
    (group,) = adapters.groups
    assert group is not None
    ends = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2]).int()
    dy, rows, hidden, dx = (torch.ones(2, features, dtype=torch.bfloat16) for features in (256, 512, 8, 512))
    with PeakBytes() as measured:
        ExpertAdapters(adapters, group, ends, torch.ones(2)).backward(dy, rows, hidden, dx)
    predicted = num_slots * 8 * 4 * converted_at_use([(512, 256)], most < num_slots * 4)
    assert predicted <= measured.peak <= 1.05 * predicted
