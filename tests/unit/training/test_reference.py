"""The operations of `reference` against PyTorch's own operations and its autograd."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference_cases import DOUBLE, GROUPS, assert_close, make_adapters, random

from orchestrator.training.fast.ops import reference
from orchestrator.training.fast.ops.protocol import AttentionConfig, LmHead
from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters
from orchestrator.training.fast.step.flat_batch import IGNORED, FlatBatch, Span, TokenizedRows

pytestmark = pytest.mark.usefixtures("seed")

MakeRows = Callable[..., TokenizedRows]
MakeTable = Callable[..., dict[str, float]]
MakeRow = Callable[..., FlatBatch]


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


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu_and_its_backward(activation: Any) -> None:
    gate_up, gradient = random(7, 2 * 9).requires_grad_(), random(7, 9)
    gate, up = gate_up.chunk(2, -1)
    if activation == "silu":
        exact = gate / (1 + torch.exp(-gate)) * up
    else:
        exact = gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    assert_close(reference.glu(gate_up.detach(), activation), exact)
    (dgate_up,) = torch.autograd.grad(exact, gate_up, gradient)
    assert_close(reference.glu_backward(gradient, gate_up.detach(), activation), dgate_up)


@pytest.mark.parametrize("over_all_heads", [False, True])
def test_qk_norm_and_its_backward(over_all_heads: bool) -> None:
    config, qkv, gradient = make_config(3, 2, 8), random(5, 7 * 8).requires_grad_(), random(5, 7 * 8)
    weights = [random(8 * (count if over_all_heads else 1)) for count in (3, 2)]
    parts = list(qkv.split((3 * 8, 2 * 8, 2 * 8), 1))
    for index, weight in enumerate(weights):
        grouped = parts[index].unflatten(1, (-1, len(weight)))
        parts[index] = exact_norm(grouped, weight, 1e-5).flatten(1)
    exact = torch.cat(parts, 1)
    normed, rstd = reference.qk_norm(qkv.detach(), *weights, 1e-5, config)
    assert_close(normed, exact)
    (dqkv,) = torch.autograd.grad(exact, qkv, gradient)
    reference.qk_norm_backward_(gradient, qkv.detach(), rstd, *weights, config)
    assert_close(gradient, dqkv)


def make_config(queries: int, keys: int, size: int, rotary: int | None = None, **settings: Any) -> AttentionConfig:
    angles = torch.arange(40)[:, None] / 10 ** torch.linspace(0, 2, (rotary or size) // 2, dtype=torch.float64)
    angles = torch.cat((angles, angles), 1)
    return AttentionConfig(queries, keys, size, angles.cos(), angles.sin(), **{"scale": size**-0.5} | settings)


def exact_attention(qkv: torch.Tensor, lengths: list[int], config: AttentionConfig) -> torch.Tensor:
    """Attend one sequence after another, with rotation as a product of complex numbers (arXiv 2104.09864, 3.2.1)."""
    outputs = []
    for sequence in qkv.split(lengths):
        parts = sequence.unflatten(1, (-1, config.head_dim)).split(
            (config.num_heads, config.num_kv_heads, config.num_kv_heads), 1
        )
        size = config.cos.shape[1]
        angle = torch.complex(config.cos, config.sin)[: len(sequence), None, : size // 2]
        rotated = [torch.complex(*part[..., :size].chunk(2, -1)) * angle for part in parts[:2]]
        query, key = (
            torch.cat((turned.real, turned.imag, part[..., size:]), -1)
            for turned, part in zip(rotated, parts, strict=False)
        )
        key, value = (part.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for part in (key, parts[2]))
        scores = torch.einsum("ihd,jhd->hij", query, key) * config.scale
        if config.softcap is not None:
            scores = config.softcap * torch.tanh(scores / config.softcap)
        seen = torch.ones(scores.shape[1:]).tril(0).bool()
        if config.window is not None:
            seen = seen.triu(1 - config.window)
        scores = scores.masked_fill(~seen, -math.inf)
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), value).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    "settings",
    [{}, {"scale": 0.7}, {"window": 4}, {"softcap": 0.5}, {"window": 6, "softcap": 2.0, "rotary": 6}],
    ids=str,
)
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (6, 2), (4, 1)])
def test_attention_and_its_backward(
    make_rows: MakeRows,
    make_table: MakeTable,
    make_row: MakeRow,
    queries: int,
    keys: int,
    settings: dict[str, Any],
) -> None:
    rows, config = make_rows(5, 1, 13, 9), make_config(queries, keys, 8, **settings)
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
    adapters.factors.uniform_(0.5, 2.0)
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
        up = torch.einsum("tr,tor->to", lora_hidden, b[slot_of, at : at + layer.out_features])
        up = up * (scales * adapters.factors[index][slot_of])[:, None]
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
    """Write A and B of ranks below the stack rank by PEFT's names, and read them as the products do."""
    layers = GROUPS["two of three"]
    adapters = make_adapters(2, layers, rank=8)
    adapters.weights.zero_()
    adapters.set_patterns(1, {"v": 2}, {})
    written = {name: matrix.normal_() for name, matrix in adapters.matrices(1, 3, adapters.weights)}
    assert {name: tuple(matrix.shape) for name, matrix in written.items()} == {
        "q.lora_A": (3, 24), "q.lora_B": (12, 3), "v.lora_A": (2, 24), "v.lora_B": (8, 2),
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


@pytest.mark.parametrize(("divisor", "softcap"), [(1.0, None), (3.0, None), (0.5, 2.0)])
@pytest.mark.parametrize("tokens_at_a_time", [100, 7, 1])
def test_cross_entropy(
    make_rows: MakeRows,
    make_table: MakeTable,
    make_row: MakeRow,
    monkeypatch: pytest.MonkeyPatch,
    tokens_at_a_time: int,
    divisor: float,
    softcap: float | None,
) -> None:
    monkeypatch.setattr(reference, "MAX_LOGITS", tokens_at_a_time * 90 + 1)
    spans = [Span(1, make_rows(9, 4), [0, 1], make_table(loss_weight=0.3)), Span(0, make_rows(6), [0], make_table())]
    batch = make_row(*spans, num_slots=2, num_tokens=32)
    states, head = random(32, 16).requires_grad_(), random(90, 16)
    head[batch.targets[2].long()] = states[2].detach()  # so that this target is the likeliest
    weights = torch.tensor([0.1, 0.3])[batch.tile_slots.repeat_interleave(reference.TILE).long()]
    logits = states @ head.T / divisor
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lm_head = LmHead(head, divisor, softcap)
    exact = F.cross_entropy(logits, batch.targets.long(), reduction="none", ignore_index=IGNORED)
    (dhidden,) = torch.autograd.grad(exact, states, weights.double())
    losses, hits, gradient = reference.cross_entropy(states.detach(), lm_head, batch, with_gradient=True)
    assert_close(losses, exact)
    assert torch.equal(losses == 0, batch.targets == IGNORED)
    assert gradient is not None
    assert_close(gradient, dhidden)
    assert torch.equal(hits.bool(), logits.argmax(-1) == batch.targets)
    assert hits[2]
    evaluated = reference.cross_entropy(states.detach(), lm_head, batch, with_gradient=False)
    assert torch.equal(evaluated[0], losses)
    assert torch.equal(evaluated[1], hits)
    assert evaluated[2] is None


def test_sum_by_slot(make_rows: MakeRows, make_table: MakeTable, make_row: MakeRow) -> None:
    rows = make_rows(9, 4, 20)
    batch = make_row(*(Span(slot, rows, [slot], make_table()) for slot in (2, 0)), num_slots=3)
    values = random(batch.num_tokens)
    sums = reference.sum_by_slot(values, batch, 3)
    assert sums.tolist() == pytest.approx([values[24:].sum().item(), 0, values[:24].sum().item()])
