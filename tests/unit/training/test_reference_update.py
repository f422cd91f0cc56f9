"""`reference.update` against the AdamW of PyTorch and, with moments in eight bits, that of bitsandbytes."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim import AdamW8bit
from reference_cases import GROUPS, assert_close, make_adapters, random

from orchestrator.training.fast.drive.slot_view import copied
from orchestrator.training.fast.ops import reference
from orchestrator.training.fast.ops.eight_bit import dynamic_code
from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters
from orchestrator.training.fast.step.flat_batch import FlatBatch, Span, TokenizedRows

pytestmark = pytest.mark.usefixtures("seed")

MakeRows = Callable[..., TokenizedRows]
MakeTable = Callable[..., dict[str, float]]
MakeRow = Callable[..., FlatBatch]


def test_update_is_clipping_and_adamw(make_rows: MakeRows, make_table: MakeTable, make_row: MakeRow) -> None:
    """Compare with PyTorch: slot 0 is clipped and decays, slot 1 neither; the batch of slot 2 goes on."""
    settings = {
        0: {"learning_rate": 1e-2, "weight_decay": 0.1, "max_norm": 0.5},
        1: {
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "max_norm": math.inf,
            "one_minus_beta1": 1 - 0.8,
            "one_minus_beta2": 1 - 0.95,
        },
        2: {"learning_rate": 1e-2, "weight_decay": 0.1, "max_norm": 0.5, "applies": 0},
    }
    betas = {0: (0.9, 0.999), 1: (0.8, 0.95)}
    adapters = Adapters([GROUPS["all of three"]], 3, 4, torch.float32, torch.float32, torch.device("cpu"))
    adapters.weights.normal_()
    parameters = {slot: torch.nn.Parameter(adapters.weights[slot].clone()) for slot in (0, 1)}
    optimizers = {
        slot: torch.optim.AdamW(
            [parameter],
            lr=settings[slot]["learning_rate"],
            weight_decay=settings[slot]["weight_decay"],
            betas=betas[slot],
            eps=1e-8,
        )
        for slot, parameter in parameters.items()
    }
    before = [flat[2].clone() for flat in (adapters.weights, adapters.moment1, adapters.moment2)]
    going_on = torch.zeros_like(adapters.gradients[2])
    for step in range(1, 6):
        corrections = {
            slot: {"bias_correction1": 1 - one**step, "bias_correction2": 1 - two**step}
            for slot, (one, two) in betas.items()
        }
        tables = [make_table(step=step, **settings[slot] | corrections.get(slot, {})) for slot in range(3)]
        batch = make_row(*(Span(slot, make_rows(9), [0], table) for slot, table in enumerate(tables)), num_slots=3)
        gradients = torch.randn_like(adapters.gradients)
        adapters.gradients += gradients
        going_on += gradients[2]
        norms = reference.update(adapters, batch)
        for slot, parameter in parameters.items():
            parameter.grad = gradients[slot].clone()
            norm = torch.nn.utils.clip_grad_norm_([parameter], settings[slot]["max_norm"])
            assert norms[slot].item() == pytest.approx(norm.item(), rel=1e-6)
            optimizers[slot].step()
            state = optimizers[slot].state[parameter]
            assert_close(adapters.weights[slot], parameter)
            assert_close(adapters.moment1[slot], state["exp_avg"])
            assert_close(adapters.moment2[slot], state["exp_avg_sq"])
            assert not adapters.gradients[slot].any()
    for flat, was in zip((adapters.weights, adapters.moment1, adapters.moment2), before, strict=True):
        assert torch.equal(flat[2], was)
    assert_close(adapters.gradients[2], going_on)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_code_is_that_of_bitsandbytes(signed: bool) -> None:
    assert torch.equal(dynamic_code(signed), create_dynamic_map(signed))


@pytest.mark.parametrize("ranks", [{}, {"m.k": 9}], ids=["one rank", "two ranks"])
def test_update_with_eight_bit_moments_is_that_of_bitsandbytes(ranks: dict[str, int]) -> None:
    """Step a slot whose ranks are below the stack rank, with matrices above and below 4,096 elements."""
    rank, betas = 12, (0.9, 0.99)
    layers = [AdaptedLayer("m.q", 0, 512, 0, 320), AdaptedLayer("m.k", 1, 512, 320, 96)]
    cpu = torch.device("cpu")
    adapters = Adapters([layers], 2, 16, torch.float32, torch.float32, cpu, eight_bit=True)
    assert adapters.eight_bit is not None
    adapters.set_patterns(1, ranks, {})
    own = dict(adapters.matrices(1, rank, adapters.weights))
    for matrix in own.values():
        matrix.normal_()
    parameters = {name: torch.nn.Parameter(matrix.clone().contiguous()) for name, matrix in own.items()}
    optimizer = AdamW8bit(list(parameters.values()), lr=1e-2, betas=betas, weight_decay=0.1, eps=1e-8)
    for step in range(1, 11):
        for name, gradient in adapters.matrices(1, rank, adapters.gradients):
            gradient.normal_().mul_(torch.rand(len(gradient), 1))
            parameters[name].grad = gradient.clone()
        values = {
            "rank": rank,
            "applies": 1,
            "max_norm": math.inf,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "epsilon": 1e-8,
        }
        values |= {f"one_minus_beta{at}": 1 - beta for at, beta in enumerate(betas, 1)}
        values |= {f"bias_correction{at}": 1 - beta**step for at, beta in enumerate(betas, 1)}
        batch: Any = SimpleNamespace(table={name: torch.tensor([0, value]) for name, value in values.items()})
        reference.update(adapters, batch)
        optimizer.step()
    in_place = dict(adapters.eight_bit_moments(1, rank))
    kept = dict(zip(in_place, copied(list(in_place.values())), strict=True))
    assert {name: moments[0].absmax is None for name, moments in kept.items()} == {
        "m.q.lora_A": False, "m.q.lora_B": True, "m.k.lora_A": False, "m.k.lora_B": True
    }  # fmt: skip
    for name, parameter in parameters.items():
        assert (own[name] - parameter).norm() <= 1e-4 * parameter.norm()
        state = optimizer.state[parameter]
        for number, moment in enumerate(kept[name], 1):
            given = moment.state(number, parameter.shape)
            assert given.keys() == {key for key in state if key.endswith(str(number))}
            for key, value in given.items():
                assert (value.shape, value.dtype) == (state[key].shape, state[key].dtype)
            others = given[f"state{number}"] != state[f"state{number}"]
            # Where the largest element of a block rounds to a neighbor, all others of the block may.
            assert moment.absmax is None or others.float().mean() < 0.03
    assert not adapters.weights[0].any()
    assert not adapters.moment1[0].any()

    states = {name: moments[0].state(1, parameters[name].shape) for name, moments in kept.items()}
    before = adapters.moment1[1].clone(), adapters.eight_bit.absmax[0, 1].clone()
    adapters.clear(1)
    assert not adapters.eight_bit.absmax.any()
    adapters.set_patterns(1, ranks, {})
    for name, (moment, _) in adapters.eight_bit_moments(1, rank):
        assert not moment.read().any()
        moment.load(1, states[name])
    assert all(map(torch.equal, (adapters.moment1[1], adapters.eight_bit.absmax[0, 1]), before))


def test_a_slot_with_a_nan_in_its_gradient_does_not_step_and_reports_it(
    make_rows: MakeRows, make_table: MakeTable, make_row: MakeRow
) -> None:
    adapters = make_adapters(3, GROUPS["one"])
    before = adapters.weights.clone()
    adapters.gradients.normal_()
    adapters.gradients[1, 5] = math.nan
    batch = make_row(*(Span(slot, make_rows(9), [0], make_table()) for slot in range(3)), num_slots=3)
    norms = reference.update(adapters, batch)
    assert norms.isfinite().tolist() == [True, False, True]
    assert torch.equal(adapters.weights[1], before[1])
    assert not adapters.moment1[1].any()
    assert not adapters.moment2[1].any()
    assert not adapters.gradients.any(), "the gradient of the next batch must begin at zero"
    assert not torch.isclose(adapters.weights[[0, 2]], before[[0, 2]]).all(1).any()


def test_nothing_trains_beyond_the_rank_of_an_adapter(
    make_rows: MakeRows, make_table: MakeTable, make_row: MakeRow
) -> None:
    adapters = make_adapters(1, GROUPS["all of three"], rank=8)
    stacked = adapters.groups[0]
    assert stacked is not None
    adapters.a(stacked, adapters.weights)[0].unflatten(0, (3, 8))[:, 5:] = 0
    adapters.b(stacked, adapters.weights)[0][:, 5:] = 0
    batch = make_row(Span(0, make_rows(20), [0], make_table(0.1, weight_decay=0.1)))
    x, gradient = random(batch.num_tokens, 24), random(batch.num_tokens, 28)
    lora_hidden = reference.lora_down(x, adapters, stacked, batch)
    reference.lora_backward(gradient, x, lora_hidden, torch.zeros_like(x), adapters, stacked, batch)
    reference.update(adapters, batch)
    for flat in (adapters.weights, adapters.moment1, adapters.moment2):
        a, b = adapters.a(stacked, flat)[0].unflatten(0, (3, 8)), adapters.b(stacked, flat)[0]
        assert a[:, :5].any()
        assert b[:, :5].any()
        assert not a[:, 5:].any()
        assert not b[:, 5:].any()
