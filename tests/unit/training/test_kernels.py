"""Each Triton kernel computes what `reference` does. `test_kernels_update.py` tests the kernel of AdamW."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import (
    BATCHES,
    DEVICE,
    DTYPE,
    GROUPS,
    NUM_SLOTS,
    ON_GPU,
    TOLERANCE,
    assert_close,
    dropout,
    is_real,
    kernels,
    make_adapters,
    make_batch,
    one_slot,
    random,
    several_slots,
)

from orchestrator.training.fast.ops import reference
from orchestrator.training.fast.ops.protocol import AttentionConfig, LmHead
from orchestrator.training.fast.step.adapters import AdaptedLayer
from orchestrator.training.fast.step.flat_batch import FlatBatch

pytestmark = pytest.mark.usefixtures("seed")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("delta", [True, False])
def test_add_norm(delta: bool, wide: bool) -> None:
    states, weight = random(5, 100), random(100, dtype=torch.float32 if wide else DTYPE)
    added = random(5, 100) if delta else None
    ours = kernels.add_norm(states, added, weight, 1e-5)
    for value, exact in zip(ours, reference.add_norm(states, added, weight, 1e-5), strict=True):
        assert_close(value, exact)
        assert value.dtype == exact.dtype


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("residual", [True, False])
def test_add_norm_backward(residual: bool, wide: bool) -> None:
    dnormed, states, weight = random(5, 100), random(5, 100), random(100, dtype=torch.float32 if wide else DTYPE)
    rstd = reference.add_norm(states, None, weight, 1e-5)[2]
    inputs = (random(5, 100) if residual else None, dnormed, states, rstd, weight)
    ours, exact = kernels.add_norm_backward(*inputs), reference.add_norm_backward(*inputs)
    assert_close(ours, exact)
    assert ours.dtype == exact.dtype


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped_silu"])
def test_glu_and_its_backward(activation: Any) -> None:
    gate_up, gradient = random(5, 2 * 1100), random(5, 1100)
    if activation == "clamped_silu":
        gate_up *= 6  # some are beyond the limit
    assert_close(kernels.glu(gate_up, activation), reference.glu(gate_up, activation))
    exact = reference.glu_backward(gradient, gate_up, activation)
    assert_close(kernels.glu_backward(gradient, gate_up, activation), exact)


@pytest.mark.parametrize(("heads", "size"), [((6, 2), 32), ((3, 3), 80)])
@pytest.mark.parametrize("over_all_heads", [False, True])
def test_qk_norm_and_its_backward(heads: tuple[int, int], size: int, over_all_heads: bool) -> None:
    queries, keys = heads
    config = make_config(queries, keys, size)
    q_weight, k_weight = (random(size * (count if over_all_heads else 1), dtype=torch.float32) for count in heads)
    qkv, gradient = (random(5, (queries + 2 * keys) * size) for _ in range(2))
    normed, rstd = kernels.qk_norm(qkv, q_weight, k_weight, 1e-6, config)
    exact, exact_rstd = reference.qk_norm(qkv, q_weight, k_weight, 1e-6, config)
    assert_close(normed, exact)
    assert_close(rstd, exact_rstd)
    assert torch.equal(normed[:, -keys * size :], qkv[:, -keys * size :]), "values stay as they are"
    ours = gradient.clone()
    kernels.qk_norm_backward_(ours, qkv, exact_rstd, q_weight, k_weight, config)
    reference.qk_norm_backward_(gradient, qkv, exact_rstd, q_weight, k_weight, config)
    assert_close(ours, gradient)


def make_config(queries: int, keys: int, size: int, rotary: int | None = None, **settings: Any) -> AttentionConfig:
    """Make a configuration with angles for 100 positions. `rotary` features are rotated, by default all."""
    half = (rotary or size) // 2
    angles = torch.arange(100, device=DEVICE)[:, None] / 10 ** torch.linspace(0, 3, half, device=DEVICE)
    angles = torch.cat((angles, angles), 1)
    settings = {"scale": size**-0.5} | settings
    return AttentionConfig(queries, keys, size, angles.cos().to(DTYPE), angles.sin().to(DTYPE), **settings)


CONFIGS = {
    "as many keys": make_config(2, 2, 32),
    "shared keys": make_config(6, 2, 32),
    "a window": make_config(6, 2, 32, window=11),
    "a window of one token": make_config(2, 2, 32, window=1),
    "a cap": make_config(6, 2, 32, softcap=1.5),
    "a scale, a window and a cap": make_config(4, 1, 32, scale=0.4, window=20, softcap=2.0),
    "rotated in part": make_config(2, 2, 32, rotary=24),
    "heads of 48, rotated in part": make_config(2, 1, 48, rotary=20),
    "heads of 80": make_config(2, 2, 80),
    "heads of 96, a window": make_config(6, 2, 96, window=30),
    "heads of 128": make_config(2, 1, 128),
    "heads of 256, a window": make_config(4, 2, 256, window=30),
    "sinks": make_config(6, 2, 32),
    "sinks, a window": make_config(2, 1, 64, window=11),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("make", BATCHES)
def test_attention_and_its_backward(make: Callable[[], FlatBatch], name: str) -> None:
    batch, config = make(), CONFIGS[name]
    wide = replace(config, cos=config.cos.float(), sin=config.sin.float())
    heads = config.num_heads + 2 * config.num_kv_heads
    qkv = random(batch.num_tokens, heads * config.head_dim)
    gradient = random(batch.num_tokens, config.num_heads * config.head_dim)
    sinks = random(config.num_heads) if "sinks" in name else None
    output, saved = kernels.attention(qkv.clone(), batch, config, sinks)
    exact, reference_saved = reference.attention(qkv.float(), batch, wide, sinks)
    assert_close(output, exact)
    dqkv = kernels.attention_backward(gradient, saved, batch, config)
    assert_close(dqkv, reference.attention_backward(gradient.float(), reference_saved, batch, wide))


def test_attention_does_not_spread_nan_to_other_sequences() -> None:
    batch = several_slots()
    angles = torch.zeros(100, 32, device=DEVICE, dtype=DTYPE)
    config = AttentionConfig(2, 2, 32, angles, angles, 1.0)
    qkv, gradient = random(batch.num_tokens, 6 * 32), random(batch.num_tokens, 2 * 32)
    sick = (batch.tile_slots == 2).repeat_interleave(kernels.TILE)
    qkv[sick] = float("nan")
    output, saved = kernels.attention(qkv, batch, config)
    dqkv = kernels.attention_backward(gradient, saved, batch, config)
    assert output[~sick].isfinite().all()
    assert dqkv[~sick].isfinite().all()


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, so that reading what was not written shows."""

    def filled(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **options: Any) -> Any:
            tensor = make(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("make", BATCHES)
def test_adapters_and_their_backward(make: Callable[[], FlatBatch], group: str, rank: int) -> None:
    """Compare within each slot's own rank; what the stack has beyond it must not be read."""
    batch, layers = make(), GROUPS[group]
    ours, exact = make_adapters(batch, [layers], rank)
    live = (torch.arange(rank, device=DEVICE) < batch.table["rank"][batch.slot_ids][:, None]).repeat(1, len(layers))
    stacked = ours.groups[0]
    width = max(layer.column + layer.out_features for layer in layers)
    x, y = random(batch.num_tokens, stacked.in_features), random(batch.num_tokens, width)
    lora_hidden, expected_hidden = (
        kernels.lora_down(x, ours, stacked, batch),
        reference.lora_down(x.float(), exact, stacked, batch),
    )
    assert_close(lora_hidden.where(live, 0), expected_hidden)
    expected = y.to(torch.float32, copy=True)
    kernels.lora_up_(y, lora_hidden, ours, stacked, batch)
    reference.lora_up_(expected, expected_hidden, exact, stacked, batch)
    assert_close(y, expected)

    dx, gradient = random(*x.shape), random(*y.shape) * is_real(batch)
    expected = dx.to(torch.float32, copy=True)
    for adapters in (ours, exact):  # gradients add up
        torch.manual_seed(1)
        adapters.gradients.normal_()
    before = ours.gradients.clone()
    kernels.lora_backward(gradient, x, lora_hidden, dx, ours, stacked, batch)
    reference.lora_backward(gradient.float(), x.float(), expected_hidden, expected, exact, stacked, batch)
    assert_close(dx, expected)
    for slot in range(ours.num_slots):
        if slot in batch.tile_slots:
            for view in (ours.a, ours.b):
                own, others = (view(stacked, flat - before)[slot] for flat in (ours.gradients, exact.gradients))
                assert_close(own, others, max(TOLERANCE, 1e-4))
        else:
            assert torch.equal(ours.gradients[slot], before[slot])


def test_wide_ranks_and_stored_bfloat16() -> None:
    batch, layers = one_slot(), GROUPS["two of three"]
    ours, exact = make_adapters(batch, [layers], 128, torch.bfloat16 if ON_GPU else torch.float32)
    stacked = ours.groups[0]
    x, dx, gradient = (
        random(batch.num_tokens, 72),
        random(batch.num_tokens, 72),
        random(batch.num_tokens, 88) * is_real(batch),
    )
    lora_hidden, expected_hidden = (
        kernels.lora_down(x, ours, stacked, batch),
        reference.lora_down(x.float(), exact, stacked, batch),
    )
    assert_close(lora_hidden, expected_hidden)
    expected = dx.to(torch.float32, copy=True)
    kernels.lora_backward(gradient, x, lora_hidden, dx, ours, stacked, batch)
    reference.lora_backward(gradient.float(), x.float(), expected_hidden, expected, exact, stacked, batch)
    assert_close(dx, expected)
    assert_close(ours.gradients, exact.gradients)


def test_dropout_masks_have_the_same_bits() -> None:
    batch = make_batch({1: [70], 0: [60]}, 3, 2, threshold={0: dropout(0.3)[0], 1: dropout(0.9)[0]})
    numbers = (0, 7, 153)
    layers = [AdaptedLayer(str(number), number, 48, 48 * number, 48) for number in numbers]
    adapters, _ = make_adapters(batch, [layers], 64)
    stacked = adapters.groups[0]
    adapters.a(stacked, adapters.weights)[:] = torch.eye(64, 48, device=DEVICE).repeat(3, 1)
    lora_hidden = kernels.lora_down(
        torch.ones(batch.num_tokens, 48, dtype=DTYPE, device=DEVICE), adapters, stacked, batch
    )
    for number, masks in zip(numbers, lora_hidden.unflatten(1, (3, 64)).unbind(1), strict=True):
        assert torch.equal(masks[:, :48] != 0, reference.dropout_mask(batch, number, 48))


def test_nan_in_a_slot_does_not_reach_other_slots() -> None:
    batch = several_slots()
    ours, _ = make_adapters(batch, [GROUPS["three"]], 16)
    stacked = ours.groups[0]
    ours.weights[2] = float("nan")
    x, y, dx = random(batch.num_tokens, 72), random(batch.num_tokens, 88), random(batch.num_tokens, 72)
    lora_hidden = kernels.lora_down(x, ours, stacked, batch)
    kernels.lora_up_(y, lora_hidden, ours, stacked, batch)
    kernels.lora_backward(y, x, lora_hidden, dx, ours, stacked, batch)
    sick = (batch.tile_slots == 2).repeat_interleave(kernels.TILE)
    for values in (lora_hidden, y, dx):
        assert values[sick].isnan().any()
        assert values[~sick].isfinite().all()
    assert ours.gradients[2].isnan().any()
    assert ours.gradients[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(("divisor", "softcap"), [(1.0, None), (3.0, None), (1.0, 5.0), (0.5, 8.0)])
@pytest.mark.parametrize("max_logits", [1 << 26, 50 * 4200])
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, max_logits: int, divisor: float, softcap: float | None) -> None:
    monkeypatch.setitem(kernels.cross_entropy.__globals__, "MAX_LOGITS", max_logits)
    batch = make_batch({1: [30], 0: [20]}, 2, 2, loss_weight={0: 0.3, 1: 0.01})
    states, head = random(batch.num_tokens, 32), random(4200, 32)
    with torch.no_grad():  # so that some targets are the likeliest
        head[batch.targets[:10].clamp(min=0).long()] = states[:10]
    logits = (states @ head.T).float() / divisor  # as the kernel rounds them
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    lm_head = LmHead(head, divisor, softcap)
    for trains in (True, False):
        losses, hits, gradient = kernels.cross_entropy(states, lm_head, batch, trains)
        expected_losses, expected_hits, expected = reference.cross_entropy(states, lm_head, batch, trains)
        assert_close(losses, expected_losses)
        likeliest = (logits.argmax(-1) == batch.targets) if ON_GPU else expected_hits.bool()
        if softcap is None or not ON_GPU:  # near the cap, the last bits of tanh decide
            assert torch.equal(hits.bool(), likeliest)
        assert hits.any()
        assert (losses[batch.targets == -100] == 0).all()
        if trains:
            assert_close(gradient, expected)
        else:
            assert gradient is None


def test_of_equally_likely_tokens_the_first_counts() -> None:
    batch = make_batch({0: [40]}, 1, 1)
    batch = replace(batch, target_tokens=torch.arange(40, device=DEVICE, dtype=torch.int32))
    states, head = (torch.randint(-2, 3, (size, 4), device=DEVICE).to(DTYPE) for size in (kernels.TILE, 100))
    logits = states.float() @ head.float().T  # small integers, so that many are equal
    likeliest, index = logits == logits.max(1, keepdim=True).values, torch.arange(100, device=DEVICE)
    first, last = (likeliest * (100 - index)).argmax(1), (likeliest * (1 + index)).argmax(1)
    batch.targets[:20], batch.targets[20:40] = first[:20].int(), last[20:40].int()
    hits = kernels.cross_entropy(states, LmHead(head), batch, False)[1]
    assert hits[:20].all()
    assert torch.equal(hits[20:40].bool(), (first == last)[20:40])
    assert not hits[20:40].all()


def test_sum_by_slot() -> None:
    batch = several_slots()
    values = random(batch.num_tokens, dtype=torch.float32)
    assert_close(kernels.sum_by_slot(values, batch, NUM_SLOTS), reference.sum_by_slot(values, batch, NUM_SLOTS), 1e-5)


def test_the_same_input_gives_the_same_bits() -> None:
    """Run the LoRA kernels twice: no sum may depend on which program finishes first."""
    batch, layers = one_slot(), GROUPS["one, wide"]
    results = []
    for _ in range(2):
        torch.manual_seed(2)
        ours, _ = make_adapters(batch, [layers], 16)
        stacked = ours.groups[0]
        x, gradient = random(batch.num_tokens, stacked.in_features), random(batch.num_tokens, stacked.out_features)
        lora_hidden = kernels.lora_down(x, ours, stacked, batch)
        dx = torch.zeros_like(x)
        kernels.lora_backward(gradient, x, lora_hidden, dx, ours, stacked, batch)
        results.append((lora_hidden, dx, ours.gradients))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
