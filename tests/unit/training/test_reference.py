"""The operations of `reference` against PyTorch's own operations and its autograd."""

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim import AdamW8bit

from orchestrator.training.fast.drive.slot import dropout_key
from orchestrator.training.fast.drive.slot_view import copied
from orchestrator.training.fast.ops import reference
from orchestrator.training.fast.ops.eight_bit import dynamic_code
from orchestrator.training.fast.ops.protocol import AttentionConfig
from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters
from orchestrator.training.fast.step.flat_batch import IGNORED, FlatBatch, Span, TokenizedRows

MakeRows = Callable[..., TokenizedRows]
MakeTable = Callable[..., dict[str, float]]
MakeRow = Callable[..., FlatBatch]

FLOAT = 1e-6
"""Largest difference relative to the norm, where a part is computed in float32."""
DOUBLE = 1e-12
"""The same where all is computed in float64."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_close(value: torch.Tensor, exact: torch.Tensor, tolerance: float = FLOAT) -> None:
    assert value.shape == exact.shape
    value, exact = value.detach().double(), exact.detach().double()
    error = float((value - exact).norm() / exact.norm())
    assert error <= tolerance, f"the difference is {error:.2e} of the norm"


# Norm, SwiGLU


def exact_norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.rms_norm(states, states.shape[-1:], weight, epsilon)


@pytest.mark.parametrize("has_delta", [True, False])
def test_add_norm_and_its_backward(has_delta: bool) -> None:
    states, weight = random(7, 40), random(40)
    delta = random(7, 40) if has_delta else None
    total, normed, root = reference.add_norm(states, delta, weight, 1e-3)
    leaf = (states if delta is None else states + delta).requires_grad_()
    exact = exact_norm(leaf, weight, 1e-3)
    assert_close(total, leaf, DOUBLE)
    assert_close(normed, exact)
    dtotal, dnormed = random(7, 40), random(7, 40)
    (dleaf,) = torch.autograd.grad([leaf * 1.0, exact], leaf, [dtotal, dnormed])
    assert_close(reference.add_norm_backward(dtotal, dnormed, total, root, weight), dleaf)


def test_swiglu_and_its_backward() -> None:
    gate_up, gradient = random(7, 40).requires_grad_(), random(7, 20)
    gate, up = gate_up[:, :20], gate_up[:, 20:]
    exact = gate / (1 + torch.exp(-gate)) * up
    assert_close(reference.swiglu(gate_up.detach()), exact)
    (dgate_up,) = torch.autograd.grad(exact, gate_up, gradient)
    assert_close(reference.swiglu_backward(gradient, gate_up.detach()), dgate_up)


# Attention


def make_config(queries: int, keys: int, size: int) -> AttentionConfig:
    angles = torch.arange(40)[:, None] / 10 ** torch.linspace(0, 2, size // 2, dtype=torch.float64)
    angles = torch.cat((angles, angles), 1)
    return AttentionConfig(queries, keys, size, angles.cos(), angles.sin())


def exact_attention(qkv: torch.Tensor, lengths: list[int], config: AttentionConfig) -> torch.Tensor:
    """Attend one sequence after another, with rotation as a product of complex numbers (arXiv 2104.09864, 3.2.1)."""
    outputs = []
    for sequence in qkv.split(lengths):
        parts = sequence.unflatten(1, (-1, config.head_dim)).split(
            (config.num_heads, config.num_kv_heads, config.num_kv_heads), 1
        )
        angle = torch.complex(config.cos, config.sin)[: len(sequence), None, : config.head_dim // 2]
        rotated = [torch.complex(*part.chunk(2, -1)) * angle for part in parts[:2]]
        query, key = (torch.cat((part.real, part.imag), -1) for part in rotated)
        key, value = (part.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for part in (key, parts[2]))
        scores = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(config.head_dim)
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), value).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (6, 2), (4, 1)])
def test_attention_and_its_backward(
    make_rows: MakeRows, make_table: MakeTable, make_row: MakeRow, queries: int, keys: int
) -> None:
    rows, config = make_rows(5, 1, 13, 9), make_config(queries, keys, 8)
    batch = make_row(
        Span(0, rows, [2, 0, 1], make_table()), Span(1, rows, [3], make_table()), num_slots=2, num_tokens=48
    )
    lengths = [13, 5, 1, 5, 9, 7, 8]  # with the padding of each slot's tiles and of the bucket
    qkv, gradient = random(48, (queries + 2 * keys) * 8).requires_grad_(), random(48, queries * 8)
    exact = exact_attention(qkv, lengths, config)
    output, saved = reference.attention(qkv.detach(), batch, config)
    assert_close(output, exact, DOUBLE)
    (dqkv,) = torch.autograd.grad(exact, qkv, gradient)
    assert_close(reference.attention_backward(gradient, saved, batch, config), dqkv, DOUBLE)


def test_nan_stays_in_its_sequence(make_rows: MakeRows, make_table: MakeTable, make_row: MakeRow) -> None:
    rows, config = make_rows(5, 13, 9), make_config(2, 2, 8)
    batch = make_row(*(Span(slot, rows, [slot], make_table()) for slot in range(3)), num_slots=3)
    qkv, gradient = random(batch.num_tokens, 6 * 8), random(batch.num_tokens, 2 * 8)
    sick = (batch.tile_slots == 1).repeat_interleave(reference.TILE)
    qkv[sick], gradient[sick] = math.nan, math.nan
    output, saved = reference.attention(qkv, batch, config)
    assert output[~sick].isfinite().all()
    assert reference.attention_backward(gradient, saved, batch, config)[~sick].isfinite().all()


# Adapters

DROPOUTS = {0: 0.5, 1: 0.0, 2: 0.1}
SCALES = {0: 2.0, 1: 0.5, 2: 1.0}
GROUPS = {
    "all of three": [AdaptedLayer("q", 4, 24, 0, 12), AdaptedLayer("k", 5, 24, 12, 8), AdaptedLayer("v", 6, 24, 20, 8)],
    "two of three": [AdaptedLayer("q", 11, 24, 0, 12), AdaptedLayer("v", 13, 24, 20, 8)],
    "one": [AdaptedLayer("down", 20, 24, 0, 28)],
}


def make_adapters(num_slots: int, layers: list[AdaptedLayer], rank: int = 4) -> Adapters:
    adapters = Adapters([layers], num_slots, rank, torch.float64, torch.float64, torch.device("cpu"))
    adapters.weights.normal_()
    return adapters


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("slots", [[0], [2, 0, 1]])
def test_adapters_and_their_backward(
    make_rows: MakeRows, make_table: MakeTable, make_row: MakeRow, group: str, slots: list[int]
) -> None:
    """Send each token through its slot's A and B, with the masks of `dropout_mask` in both directions."""
    layers, rank = GROUPS[group], 4
    spans = [
        Span(
            slot,
            make_rows(7, 12, 5, seed=slot),
            [1, 0, 2],
            make_table(DROPOUTS[slot], key=77 + slot, scale=SCALES[slot]),
            first_token=3,
        )
        for slot in slots
    ]
    batch = make_row(*spans, num_slots=len(slots), num_tokens=80)
    slot_of = batch.tile_slots.repeat_interleave(reference.TILE).long()
    adapters = make_adapters(len(slots), layers)
    stacked = adapters.groups[0]
    assert stacked is not None
    a, b = (part(stacked, adapters.weights).clone().requires_grad_() for part in (adapters.a, adapters.b))
    x, y, gradient = random(80, 24).requires_grad_(), random(80, 28), random(80, 28)
    # Padding has no gradient in a step.
    gradient[batch.targets == IGNORED] = 0

    rates = torch.tensor([DROPOUTS[slot] for slot in range(len(slots))], dtype=torch.float64)[slot_of]
    scales = torch.tensor([SCALES[slot] for slot in range(len(slots))], dtype=torch.float64)[slot_of]
    exact, at = y.clone(), 0
    for index, layer in enumerate(layers):
        dropped = x * reference.dropout_mask(batch, layer.module_id, 24) / (1 - rates)[:, None]
        lora_hidden = torch.einsum("ti,tri->tr", dropped, a[slot_of, index * rank : (index + 1) * rank])
        up = torch.einsum("tr,tor->to", lora_hidden, b[slot_of, at : at + layer.out_features]) * scales[:, None]
        exact = exact + F.pad(up, (layer.column, 28 - layer.column - layer.out_features))
        at += layer.out_features
    da, db, dx = torch.autograd.grad(exact, [a, b, x], gradient)

    output = y.clone()
    lora_hidden = reference.lora_down(x.detach(), adapters, stacked, batch)
    reference.lora_up_(output, lora_hidden, adapters, stacked, batch)
    assert_close(output, exact)
    through_base = random(80, 24)
    for times in (1, 2):  # gradients add up
        x_gradient = through_base.clone()
        reference.lora_backward(gradient, x.detach(), lora_hidden, x_gradient, adapters, stacked, batch)
        assert_close(x_gradient - through_base, dx)
        assert_close(adapters.a(stacked, adapters.gradients), times * da)
        assert_close(adapters.b(stacked, adapters.gradients), times * db)


def test_matrices_by_name_are_what_the_products_read() -> None:
    """Write A and B of a rank below the stack rank by PEFT's names, and read them as the products do."""
    layers = GROUPS["two of three"]
    adapters = make_adapters(2, layers, rank=8)
    adapters.weights.zero_()
    written = {name: matrix.normal_() for name, matrix in adapters.matrices(1, 3, adapters.weights)}
    assert {name: tuple(matrix.shape) for name, matrix in written.items()} == {
        "q.lora_A": (3, 24), "q.lora_B": (12, 3), "v.lora_A": (3, 24), "v.lora_B": (8, 3),
    }  # fmt: skip
    assert not adapters.weights[0].any()
    stacked = adapters.groups[0]
    assert stacked is not None
    a, b = adapters.a(stacked, adapters.weights)[1], adapters.b(stacked, adapters.weights)[1]
    for at, column, name in ((0, slice(0, 12), "q"), (8, slice(12, 20), "v")):
        assert_close(b[column] @ a[at : at + 8], written[f"{name}.lora_B"] @ written[f"{name}.lora_A"], DOUBLE)


def test_sixteen_adapters_of_a_7b_base_take_sixteen_bytes_a_parameter() -> None:
    """Count weights, gradients and both moments in float32, at rank 16 on all linear layers."""
    hidden, inner, groups = 4096, 11008, []
    for index in range(32):
        for features, widths in (
            (hidden, [hidden] * 3), (hidden, [hidden]), (hidden, [inner, inner]), (inner, [hidden]),
        ):  # fmt: skip
            starts = [sum(widths[:place]) for place in range(len(widths))]
            groups.append(
                [
                    AdaptedLayer(f"{index}.{start}", index, features, start, width)
                    for start, width in zip(starts, widths, strict=True)
                ]
            )
    adapters = Adapters(groups, 16, 16, torch.float32, torch.bfloat16, torch.device("meta"))
    parameters = 16 * sum(16 * (layer.in_features + layer.out_features) for group in groups for layer in group)
    assert parameters == 639_631_360
    held = [value for value in vars(adapters).values() if isinstance(value, torch.Tensor)]
    assert 16 <= sum(tensor.nbytes for tensor in held) / parameters < 16.05


# Head and loss


@pytest.mark.parametrize("tokens_at_a_time", [100, 7, 1])
def test_cross_entropy(
    make_rows: MakeRows,
    make_table: MakeTable,
    make_row: MakeRow,
    monkeypatch: pytest.MonkeyPatch,
    tokens_at_a_time: int,
) -> None:
    monkeypatch.setattr(reference, "MAX_LOGITS", tokens_at_a_time * 90 + 1)
    spans = [Span(1, make_rows(9, 4), [0, 1], make_table(loss_weight=0.3)), Span(0, make_rows(6), [0], make_table())]
    batch = make_row(*spans, num_slots=2, num_tokens=32)
    states, head = random(32, 16).requires_grad_(), random(90, 16)
    head[batch.targets[2].long()] = states[2].detach()  # so that this target is the likeliest
    weights = torch.tensor([0.1, 0.3])[batch.tile_slots.repeat_interleave(reference.TILE).long()]
    logits = states @ head.T
    exact = F.cross_entropy(logits, batch.targets.long(), reduction="none", ignore_index=IGNORED)
    (dhidden,) = torch.autograd.grad(exact, states, weights.double())
    losses, hits, gradient = reference.cross_entropy(states.detach(), head, batch, with_gradient=True)
    assert_close(losses, exact)
    assert torch.equal(losses == 0, batch.targets == IGNORED)
    assert gradient is not None
    assert_close(gradient, dhidden)
    assert torch.equal(hits.bool(), logits.argmax(-1) == batch.targets)
    assert hits[2]
    evaluated = reference.cross_entropy(states.detach(), head, batch, with_gradient=False)
    assert torch.equal(evaluated[0], losses)
    assert torch.equal(evaluated[1], hits)
    assert evaluated[2] is None


def test_sum_by_slot(make_rows: MakeRows, make_table: MakeTable, make_row: MakeRow) -> None:
    rows = make_rows(9, 4, 20)
    batch = make_row(*(Span(slot, rows, [slot], make_table()) for slot in (2, 0)), num_slots=3)
    values = random(batch.num_tokens)
    sums = reference.sum_by_slot(values, batch, 3)
    assert sums.tolist() == pytest.approx([values[24:].sum().item(), 0, values[:24].sum().item()])


# Optimizer


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


def test_update_with_eight_bit_moments_is_that_of_bitsandbytes() -> None:
    """Step a slot whose rank is below the stack rank, with matrices above and below 4,096 elements."""
    rank, betas = 12, (0.9, 0.99)
    layers = [AdaptedLayer("m.q", 0, 512, 0, 320), AdaptedLayer("m.k", 1, 512, 320, 96)]
    cpu = torch.device("cpu")
    adapters = Adapters([layers], 2, 16, torch.float32, torch.float32, cpu, eight_bit=True)
    assert adapters.eight_bit is not None
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


# Dropout masks


@pytest.fixture
def mask(make_rows: MakeRows, make_table: MakeTable, make_row: MakeRow) -> Callable[..., Any]:
    """`mask(seed=1, step=2, module=3, dropout=0.5)` returns a (tokens, features) bool mask."""

    def make(
        seed: int = 0, step: int = 0, module: int = 0, dropout: float = 0.3, tokens: int = 256, features: int = 256
    ) -> Any:
        table = make_table(dropout, key=dropout_key(seed, step))
        return reference.dropout_mask(make_row(Span(0, make_rows(tokens), [0], table)), module, features)

    return make


@pytest.mark.parametrize("dropout", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_masks_keep_the_expected_share(mask: Callable[..., Any], dropout: float) -> None:
    for module in range(3):
        kept = mask(module=module, dropout=dropout, tokens=512, features=512).double()
        variance = dropout * (1 - dropout)
        assert abs(kept.mean() - (1 - dropout)) < 4 * math.sqrt(variance / kept.numel())
        for dimension in (0, 1):  # no token and no feature is dropped more often than chance explains
            spread = kept.mean(dimension).var() / (variance / 512)
            assert abs(spread - 1) < 4 * math.sqrt(2 / 512)


OTHERS = [{"step": 1}, {"step": 2}, {"step": 1000}, {"seed": 1}, {"seed": 2**32}, {"module": 1}, {"module": 7},
          {"seed": 1, "step": 1}, {"seed": 1, "step": 1, "module": 1}]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_masks_of_another_step_module_or_seed_are_independent(mask: Callable[..., Any], other: dict[str, int]) -> None:
    """Correlate the masks at all shifts at once: neither is a shifted copy of the other."""
    correlation = correlations(mask(), mask(**other))
    assert correlation.abs().max() < 6  # the largest of 65,536 standard normal values is expected at 4.3


def test_a_mask_does_not_repeat_itself(mask: Callable[..., Any]) -> None:
    correlation = correlations(mask(), mask())
    assert correlation[0] > 200
    assert correlation[1:].abs().max() < 6


def correlations(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Correlate two flattened masks, the second shifted by each number of places; in standard deviations."""
    first, second = ((each.double() - each.double().mean()).flatten() / each.double().std() for each in (one, other))
    spectrum = torch.fft.rfft(first).conj() * torch.fft.rfft(second)
    return torch.fft.irfft(spectrum, len(first)) / math.sqrt(len(first))


def test_masks_with_similar_keys_are_independent() -> None:
    """Take keys whose hashes differ in the lowest bits only.

    If a key entered the hash once, the mask of one would be that of the other with its tokens in another order.
    """
    keys = torch.tensor([dropout_key(seed, step) for seed in range(8) for step in range(1000)], dtype=torch.int32)
    mixed = torch.from_numpy(reference._lowbias32(keys.numpy().view(np.uint32)).view(np.int32))
    order = mixed.sort().indices.tolist()
    close = [(i, j) for i, j in pairwise(order) if int(mixed[i] ^ mixed[j]) in range(1, 1 << 12)]
    assert len(close) >= 5, "the test needs such pairs"
    for i, j in close:
        one, other = (halved(int(keys[k]), 1 << 12) for k in (i, j))
        moved = other[torch.arange(1 << 12) ^ int(mixed[i] ^ mixed[j])]
        assert abs((one == moved).double().mean() - 0.5) < 0.05


def halved(key: int, tokens: int) -> torch.Tensor:
    """Return the mask of the first feature at dropout 0.5: (tokens,) bool."""
    table = {"key": torch.tensor([key], dtype=torch.int32), "threshold": torch.tensor([1 << 30], dtype=torch.int32)}
    nothing, positions = torch.zeros(tokens, dtype=torch.int32), torch.arange(tokens, dtype=torch.int32)
    batch = FlatBatch(nothing, nothing, nothing, positions, nothing[:1], nothing, table, tokens)
    return reference.dropout_mask(batch, 0, 1)[:, 0]


def test_the_corners_of_a_rectangle_in_a_mask_are_independent(mask: Callable[..., Any]) -> None:
    """Three corners of a rectangle do not predict the fourth, although tokens and features have one word each."""
    kept = mask(dropout=0.5, tokens=512, features=512).double() * 2 - 1
    for token in (1, 2, 3, 7, 64, 100):
        for feature in (1, 2, 3, 5, 8, 21, 34, 64, 89, 256):
            corners = (
                kept[token:, feature:] * kept[token:, :-feature] * kept[:-token, feature:] * kept[:-token, :-feature]
            )
            assert abs(corners.mean()) < 5 / math.sqrt(corners.numel())


def test_a_mask_does_not_depend_on_position_bucket_or_neighbors(
    make_rows: MakeRows, make_table: MakeTable, make_row: MakeRow
) -> None:
    rows, table = make_rows(7, 12, 5, 9), make_table(0.4, key=99)
    other = make_table(0.7, key=98)

    def span(slot: int, indices: list[int], first_token: int = 0) -> Span:
        return Span(slot, rows, indices, table, first_token)

    whole = reference.dropout_mask(make_row(span(0, [1, 0, 2])), 3, 20)[:24]
    arrangements = [
        (0, make_row(span(0, [1, 0, 2]), num_tokens=200)),
        (0, make_row(span(0, [2, 1, 0]))),  # the rows in another order
        (16, make_row(Span(2, rows, [3], other), span(1, [1, 0, 2]), num_slots=3)),
        (40, make_row(Span(0, rows, [1, 3], other), Span(1, rows, [0, 3], other), span(4, [1, 0, 2]), num_slots=5)),
    ]
    for at, batch in arrangements:
        assert torch.equal(reference.dropout_mask(batch, 3, 20)[at : at + 24], whole)
    # In the second pass of a batch the mask continues where it ended in the first.
    assert torch.equal(reference.dropout_mask(make_row(span(0, [0, 2], first_token=12)), 3, 20)[:12], whole[12:])
    assert not torch.equal(reference.dropout_mask(make_row(span(0, [0, 2])), 3, 20)[:12], whole[12:])
