"""Experts on a GPU: packed ones compute what their dequantized weights do; adapted ones are steps of a CUDA graph."""

import copy
from typing import Any

import pytest
import torch
from family_bases import base_model
from family_cases import FAMILY_CASES
from transformers import AutoModelForCausalLM

from orchestrator.experts import expert_matrices, pack_experts
from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.plan import parity
from orchestrator.training.fast.sizes import MAX_GROUPS, Recompute
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine, EvaluationBatch
from orchestrator.training.fast.step.expert_adapters import grouped_product, grouped_sum
from orchestrator.training.fast.step.flat_batch import TABLE, Span, TokenizedRows
from orchestrator.training.model.targets import adapted_names

pytestmark = pytest.mark.gpu

IDS = torch.tensor([[5, 17, 300, 42, 8, 99, 4], [7, 7, 250, 31, 900, 12, 3]])


def loss_and_gradient(model: Any, precision: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = model.get_input_embeddings()(IDS.cuda()).detach().requires_grad_()
    with torch.autocast("cuda", precision or torch.bfloat16, enabled=precision is not None):
        logits = model(inputs_embeds=inputs).logits
    logits.float().square().mean().backward()
    assert inputs.grad is not None
    return logits.detach().float(), inputs.grad.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_packed_experts_compute_what_their_dequantized_values_do(family: str, dtype: torch.dtype) -> None:
    plain = base_model(family).requires_grad_(False).to("cuda", dtype)
    quantized = copy.deepcopy(plain)
    pack_experts(quantized, "nf4", True, dtype)
    for name, weight in expert_matrices(plain).items():
        packed = quantized.get_parameter(name)
        whole = packed.dequantized()
        assert whole.dtype == dtype
        weight.data = (whole.mT if packed.is_transposed else whole).contiguous()
    plain.set_experts_implementation("eager")
    precision = torch.bfloat16 if dtype == torch.bfloat16 else None
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for found, expected in zip(
        loss_and_gradient(quantized, precision), loss_and_gradient(plain, precision), strict=True
    ):
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_scales_move_with_the_codes() -> None:
    quantized = base_model("qwen3_moe").requires_grad_(False)
    pack_experts(quantized, "nf4", True, torch.float32)
    before = {name: weight.dequantized() for name, weight in expert_matrices(quantized).items()}
    for device in ("cuda", "cpu"):
        quantized.to(device)
        for name, weight in expert_matrices(quantized).items():
            assert weight.dequantized().device.type == device
            assert torch.allclose(weight.dequantized().cpu(), before[name], rtol=1e-6)


@pytest.mark.parametrize("num_groups", [5, MAX_GROUPS, MAX_GROUPS + 1, 2 * MAX_GROUPS + 100])
def test_grouped_products_of_any_number_of_rows(num_groups: int) -> None:
    """Groups may have no row, or a number of rows that is no multiple of 8."""
    torch.manual_seed(0)
    counts = torch.randint(0, 8, (num_groups,), device="cuda")
    counts[0], counts[-2:] = 0, 0
    ends = counts.cumsum(0).int()
    x, y = (torch.randn(int(ends[-1]), features, device="cuda", dtype=torch.bfloat16) for features in (64, 16))
    matrices = torch.randn(num_groups, 64, 16, device="cuda", dtype=torch.bfloat16)
    group = torch.repeat_interleave(torch.arange(num_groups, device="cuda"), counts)
    expected = torch.bmm(x.float()[:, None], matrices.float()[group])[:, 0]
    torch.testing.assert_close(grouped_product(x, matrices, ends).float(), expected, rtol=1e-2, atol=1e-1)
    outer = x.float()[:, :, None] * y.float()[:, None]
    expected = torch.zeros(num_groups, 64, 16, device="cuda").index_add_(0, group, outer)
    torch.empty(num_groups, 64, 16, device="cuda", dtype=torch.bfloat16).fill_(torch.nan)  # what is left in memory
    found = grouped_sum(x, y, ends).float()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-1)
    assert not found[counts == 0].any(), "the gradient of an expert without rows"


EXPERT_CASES = [name for name, (config, _) in FAMILY_CASES.items() if FAMILIES[config.model_type].experts is not None]
RANKS = (8, 4)


def open_engine(name: str, recompute: Recompute = "nothing") -> tuple[Any, Engine]:
    """Open an engine whose two slots have random adapters on a part of the attention and on all experts."""
    torch.manual_seed(0)
    config, quantization = FAMILY_CASES[name]
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager"
        )
    for parameter in base.eval().parameters():
        parameter.requires_grad_(False)
        parameter.data += 0.02 * torch.randn_like(parameter)
    if quantization == "nf4":
        pack_experts(base, "nf4", True, torch.bfloat16)
    names = adapted_names(base, LoraSection(dropout=0, target_modules=["q_proj", "experts"]))
    device = torch.device("cuda")
    adapters = Adapters(adapted_layers(base, names), 2, 16, torch.float32, torch.bfloat16, device, expert_rank=8)
    pool = torch.cuda.graph_pool_handle()
    engine = Engine(Decoder(base, torch.bfloat16, 64, quantization == "none"), adapters, recompute, pool, on_gpu=True)
    return base, engine


def fill(engine: Engine) -> None:
    for slot, rank in enumerate(RANKS):
        for key, matrix in engine.adapters.matrices(slot, rank, engine.adapters.weights):
            matrix.normal_(std=0.1 if key.endswith("lora_A") else 0.02)


def span_of(slot: int, ids: list[int]) -> Span:
    table = dict.fromkeys(TABLE, 0.0) | {"scale": 2.0 + slot, "keep_scale": 1.0, "loss_weight": 1.0}
    return Span(slot, TokenizedRows([ids], [ids]), [0], table | {"rank": RANKS[slot]})


@pytest.mark.parametrize("name", EXPERT_CASES)
def test_adapted_experts_compute_what_transformers_does(name: str) -> None:
    base, engine = open_engine(name)
    ids = [1 + index * index % 89 for index in range(60)]
    parity.require_parity(base, engine, TokenizedRows([ids], [ids]))


@pytest.mark.parametrize("recompute", ["nothing", "layers"])
@pytest.mark.parametrize("name", EXPERT_CASES)
def test_a_graph_updates_the_experts_of_each_slot(name: str, recompute: Recompute) -> None:
    _, engine = open_engine(name, recompute)
    fill(engine)
    gradients = engine.adapters.gradients
    for first in (1, 20, 7):  # the second and the third replay the graph of the first
        spans = [span_of(slot, [1 + (first + slot + i * i) % 60 for i in range(60)]) for slot in range(2)]
        gradients.zero_()
        together = engine.step(spans).read().losses
        replayed = gradients.clone()
        evaluations = [EvaluationBatch(engine, span.slot, span.rows, span.table) for span in spans]
        evaluated = [scores.losses[0] for scores in engine.evaluate(evaluations)]
        assert evaluated == pytest.approx(together, rel=1e-3)
        gradients.zero_()
        assert engine._run_once(spans, engine._bucket_shape([spans]), True).read().losses == pytest.approx(
            together, rel=1e-5
        )
        torch.testing.assert_close(gradients, replayed, rtol=1e-3, atol=1e-4)
        for span in spans:
            # Alone. Products of fewer rows round differently, which may change the choice between equal experts.
            gradients.zero_()
            assert engine.step_once(span).losses[span.slot] == pytest.approx(together[span.slot], rel=1e-2)
            own, other = gradients[span.slot], gradients[1 - span.slot]
            assert (own - replayed[span.slot]).norm() <= 0.2 * own.norm()
            assert not other.any()
