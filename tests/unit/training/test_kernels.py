"""Each Triton kernel computes what `reference` does: on a GPU if there is one, else in Triton's interpreter."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from orchestrator.training.fast.ops import reference  # noqa: E402
from orchestrator.training.fast.ops.eight_bit import Moment  # noqa: E402
from orchestrator.training.fast.ops.protocol import AttentionConfig  # noqa: E402
from orchestrator.training.fast.ops.triton.launch import MANY_SLOTS  # noqa: E402
from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters  # noqa: E402
from orchestrator.training.fast.step.flat_batch import BucketShape, FlatBatch, Span, TokenizedRows  # noqa: E402

PACKAGE = "orchestrator.training.fast.ops.triton"
LEAVES = (
    "launch", "lora_common", "lora_forward", "lora_backward", "attention", "adamw", "norm_swiglu_ce", "kernels",
)  # fmt: skip
MODULES = [f"{PACKAGE}.{leaf}" for leaf in LEAVES]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-5
"""Largest norm of the difference, relative to the norm of the reference, which is computed in float32."""
NUM_SLOTS = 4
RANKS = {0: 50, 1: 16, 2: 4, 3: 20, 4: 64, 5: 8, 6: 33, 7: 12}
"""Rank of each slot where there are several; the stack rank where that is smaller."""


def load_kernels() -> ModuleType:
    """Import the kernels. Without a GPU, import copies of them and of Triton that interpret.

    Other tests do not see these copies.
    """
    if ON_GPU:
        return importlib.import_module(MODULES[-1])

    def remove() -> dict[str, ModuleType]:
        return {
            name: sys.modules.pop(name)
            for name in list(sys.modules)
            if name in MODULES or (name.split(".")[0] == "triton" and not name.startswith("triton._C"))
        }

    package, others, before = importlib.import_module(PACKAGE), remove(), os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        kernels = importlib.import_module(MODULES[-1])
        patch_interpreter(importlib.import_module("triton.runtime.interpreter"))
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        remove()
        sys.modules.update(others)
        for name in MODULES:
            leaf = name.removeprefix(f"{PACKAGE}.")
            vars(package).pop(leaf, None)
            if name in others:
                setattr(package, leaf, others[name])
    return kernels


def patch_interpreter(interpreter: Any) -> None:
    """Make tensors usable as indices: NumPy 2.4 refuses arrays of one element as integers, which Triton 3.6 uses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


kernels = load_kernels()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_batch(lengths: dict[int, list[int]], num_tiles: int, num_slots: int, **table: Any) -> FlatBatch:
    """Make a flat batch of these sequences.

    Args:
        lengths: of the sequences, by slot.
        num_tiles: of the flat batch.
        num_slots: of the engine.
        table: values of the slots' table, one for all slots or a dictionary by slot.
    """
    generator = np.random.default_rng(0)
    spans = []
    for slot, slot_lengths in lengths.items():
        ids = [generator.integers(0, 90, length).tolist() for length in slot_lengths]
        labels = [[-100, *row[1:]] if len(row) < 3 else [-100, -100, *row[2:]] for row in ids]
        values = {
            "key": 1234567 + 987654321 * slot % 2**30,
            "threshold": 0,
            "keep_scale": 1.0,
            "scale": 1.0,
            "rank": 64,
            "loss_weight": 0.1,
            "applies": 1,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "one_minus_beta1": 0.1,
            "one_minus_beta2": 0.01,
            "epsilon": 1e-8,
            "bias_correction1": 0.1,
            "bias_correction2": 0.01,
            "max_norm": 1.0,
        }
        values |= {name: value[slot] if isinstance(value, dict) else value for name, value in table.items()}
        spans.append(Span(slot, TokenizedRows(ids, labels), range(len(ids)), values, first_token=17))
    shape = BucketShape(num_tiles * kernels.TILE, 16, num_slots, kernels.TILE, 100)
    buffer = shape.buffer("cpu")
    shape.fill(buffer.numpy(), spans)
    return shape.view(buffer.to(DEVICE))


def dropout(probability: float) -> tuple[int, float]:
    """Return threshold and keep_scale."""
    return int(probability * 2**31), 1 / (1 - probability)


def several_slots(num_slots: int = NUM_SLOTS) -> FlatBatch:
    """Make a batch of slots out of order: one idle, one without dropout; a tile of padding counts as slot 0."""
    drops = {0: dropout(0.5), 2: dropout(0.1), 3: dropout(0.0)}
    return make_batch(
        {2: [5, 61, 30], 0: [50], 3: [64]},
        5,
        num_slots,
        threshold={slot: threshold for slot, (threshold, _) in drops.items()},
        keep_scale={slot: scale for slot, (_, scale) in drops.items()},
        scale={0: 2.0, 2: 0.5, 3: 1.0},
        rank=RANKS,
        loss_weight={0: 0.3, 2: 0.01, 3: 1.0},
    )


def one_slot() -> FlatBatch:
    threshold, keep_scale = dropout(0.2)
    return make_batch({0: [5, 61, 30]}, 2, 1, threshold=threshold, keep_scale=keep_scale, scale=0.5)


def many_slots() -> FlatBatch:
    """Make a batch with so many slots that the kernels get other sizes."""
    return several_slots(MANY_SLOTS)


BATCHES: list[Callable[[], FlatBatch]] = [one_slot, several_slots, many_slots]


def is_real(batch: FlatBatch) -> Any:
    """Return (T, 1): 0 at padding, whose gradients are zero in a step."""
    return (batch.dropout_positions > 0).to(DTYPE)[:, None]


def random(*shape: int, dtype: Any = DTYPE) -> Any:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(value: Any, exact: Any, tolerance: float = TOLERANCE) -> None:
    assert value.shape == exact.shape
    error = (value.float() - exact.float()).norm() / exact.float().norm()
    assert error <= tolerance, f"the difference is {float(error):.2e} of the norm"


def make_adapters(
    batch: FlatBatch, groups: list[list[AdaptedLayer]], rank: int, dtype: Any = torch.float32, eight_bit: bool = False
) -> tuple[Any, Any]:
    """Make adapters for the kernels, and the same for the reference in float32. Several slots have a rank each."""
    num_slots = len(batch.table["key"])
    ours, exact = (
        Adapters(groups, num_slots, rank, dtype, compute, DEVICE, eight_bit) for compute in (DTYPE, torch.float32)
    )
    ours.weights.normal_()
    batch.table["rank"].clamp_(max=rank)
    clear_beyond(ours, ours.weights)
    exact.weights.copy_(ours.weights)
    return ours, exact


def clear_beyond(adapters: Adapters, flat: Any) -> None:
    """Set to zero what lies beyond each slot's own rank."""
    whole = flat.clone()
    flat.zero_()
    for slot in range(adapters.num_slots):
        own = min(RANKS[slot], adapters.rank) if adapters.num_slots > 1 else adapters.rank
        for group in filter(None, adapters.groups):
            a, was_a = (adapters.a(group, each)[slot].unflatten(0, (-1, adapters.rank)) for each in (flat, whole))
            a[:, :own] = was_a[:, :own]
            adapters.b(group, flat)[slot][:, :own] = adapters.b(group, whole)[slot][:, :own]


GROUPS = {
    "three": [AdaptedLayer("q", 4, 72, 0, 40), AdaptedLayer("k", 5, 72, 40, 24), AdaptedLayer("v", 6, 72, 64, 24)],
    "two of three": [AdaptedLayer("q", 11, 72, 0, 40), AdaptedLayer("v", 13, 72, 64, 24)],
    "one, wide": [AdaptedLayer("down", 20, 200, 0, 330)],
}


@pytest.mark.parametrize("delta", [True, False])
def test_add_norm(delta: bool) -> None:
    states, weight = random(5, 100), random(100)
    added = random(5, 100) if delta else None
    ours = kernels.add_norm(states, added, weight, 1e-5)
    for value, exact in zip(ours, reference.add_norm(states, added, weight, 1e-5), strict=True):
        assert_close(value, exact)


def test_add_norm_backward() -> None:
    gradient, dnormed, states, weight = random(5, 100), random(5, 100), random(5, 100), random(100)
    root = reference.add_norm(states, None, weight, 1e-5)[2]
    inputs = (gradient, dnormed, states, root, weight)
    assert_close(kernels.add_norm_backward(*inputs), reference.add_norm_backward(*inputs))


def test_swiglu_and_its_backward() -> None:
    gate_up, gradient = random(5, 2 * 1100), random(5, 1100)
    assert_close(kernels.swiglu(gate_up), reference.swiglu(gate_up))
    assert_close(kernels.swiglu_backward(gradient, gate_up), reference.swiglu_backward(gradient, gate_up))


@pytest.mark.parametrize("queries", [2, 6])
@pytest.mark.parametrize("make", BATCHES)
def test_attention_and_its_backward(make: Callable[[], FlatBatch], queries: int) -> None:
    batch, size = make(), 32
    angles = torch.arange(100, device=DEVICE)[:, None] / 10 ** torch.linspace(0, 3, size // 2, device=DEVICE)
    angles = torch.cat((angles, angles), 1)
    config = AttentionConfig(queries, 2, size, angles.cos().to(DTYPE), angles.sin().to(DTYPE))
    wide = AttentionConfig(queries, 2, size, config.cos.float(), config.sin.float())
    qkv, gradient = random(batch.num_tokens, (queries + 4) * size), random(batch.num_tokens, queries * size)
    output, saved = kernels.attention(qkv.clone(), batch, config)
    exact, reference_saved = reference.attention(qkv.float(), batch, wide)
    assert_close(output, exact)
    dqkv = kernels.attention_backward(gradient, saved, batch, config)
    assert_close(dqkv, reference.attention_backward(gradient.float(), reference_saved, batch, wide))


def test_attention_does_not_spread_nan_to_other_sequences() -> None:
    batch = several_slots()
    angles = torch.zeros(100, 32, device=DEVICE, dtype=DTYPE)
    config = AttentionConfig(2, 2, 32, angles, angles)
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


@pytest.mark.parametrize("max_logits", [1 << 26, 50 * 4200])
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, max_logits: int) -> None:
    monkeypatch.setitem(kernels.cross_entropy.__globals__, "MAX_LOGITS", max_logits)
    batch = make_batch({1: [30], 0: [20]}, 2, 2, loss_weight={0: 0.3, 1: 0.01})
    states, head = random(batch.num_tokens, 32), random(4200, 32)
    with torch.no_grad():  # so that some targets are the likeliest
        head[batch.targets[:10].clamp(min=0).long()] = states[:10]
    logits = states @ head.T  # as the kernel rounds them
    for trains in (True, False):
        losses, hits, gradient = kernels.cross_entropy(states, head, batch, trains)
        expected_losses, expected_hits, expected = reference.cross_entropy(states, head, batch, trains)
        assert_close(losses, expected_losses)
        likeliest = (logits.float().argmax(-1) == batch.targets) if ON_GPU else expected_hits.bool()
        assert torch.equal(hits.bool(), likeliest)
        assert hits.any()
        assert (losses[batch.targets == -100] == 0).all()
        if trains:
            assert_close(gradient, expected)
        else:
            assert gradient is None


def test_of_equally_likely_tokens_the_first_counts() -> None:
    batch = make_batch({0: [40]}, 1, 1)
    states, head = (torch.randint(-2, 3, (size, 4), device=DEVICE).to(DTYPE) for size in (kernels.TILE, 100))
    logits = states.float() @ head.float().T  # small integers, so that many are equal
    likeliest, index = logits == logits.max(1, keepdim=True).values, torch.arange(100, device=DEVICE)
    first, last = (likeliest * (100 - index)).argmax(1), (likeliest * (1 + index)).argmax(1)
    batch.targets[:20], batch.targets[20:40] = first[:20].int(), last[20:40].int()
    hits = kernels.cross_entropy(states, head, batch, False)[1]
    assert hits[:20].all()
    assert torch.equal(hits[20:40].bool(), (first == last)[20:40])
    assert not hits[20:40].all()


def test_sum_by_slot() -> None:
    batch = several_slots()
    values = random(batch.num_tokens, dtype=torch.float32)
    assert_close(kernels.sum_by_slot(values, batch, NUM_SLOTS), reference.sum_by_slot(values, batch, NUM_SLOTS), 1e-5)


@pytest.mark.parametrize("rank", [16, 64])
def test_update(rank: int) -> None:
    """Update four slots of different ranks: one clipped, one not, one whose batch goes on, one with a NaN."""
    batch = make_batch(
        {slot: [9] for slot in range(NUM_SLOTS)},
        NUM_SLOTS,
        NUM_SLOTS,
        max_norm={0: 1.0, 1: float("inf"), 2: 1.0, 3: 1.0},
        applies={0: 1, 1: 1, 2: 0, 3: 1},
        learning_rate={0: 1e-2, 1: 1e-3, 2: 1e-2, 3: 1e-2},
        rank=RANKS,
    )
    ours, exact = make_adapters(batch, [GROUPS["three"], GROUPS["one, wide"]], rank)
    for adapters in (ours, exact):
        torch.manual_seed(1)
        for flat in (adapters.moment1, adapters.gradients):
            flat.normal_()
        adapters.moment2.uniform_()
        for flat in (adapters.moment1, adapters.moment2, adapters.gradients):
            clear_beyond(adapters, flat)
        adapters.gradients[3, 40] = float("nan")
    before = [flat.clone() for flat in (ours.weights, ours.moment1, ours.moment2)]
    norms, expected = kernels.update(ours, batch), reference.update(exact, batch)
    assert_close(norms[:2], expected[:2], 1e-5)
    assert norms[2] == 0
    assert norms[3].isnan()
    for name in ("weights", "moment1", "moment2"):
        assert_close(getattr(ours, name), getattr(exact, name), 1e-5)
    assert torch.equal(ours.gradients, exact.gradients)
    assert ours.gradients[2].any()
    for flat, old in zip((ours.weights, ours.moment1, ours.moment2), before, strict=True):
        assert torch.equal(flat[2:], old[2:])
        assert not torch.equal(flat[:2], old[:2])


def write_nearest(moment: Moment, values: Any) -> None:
    """Quantize to the nearest value, as the kernel does. On a CPU bitsandbytes (0.50) takes a neighbor for up to 3%."""
    if moment.absmax is None:
        moment.bytes.view(torch.float32).copy_(values)
        return
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(-1, 256)
    moment.absmax.copy_(blocks.abs().amax(1))
    scaled = blocks / moment.absmax.where(moment.absmax > 0, 1.0)[:, None]
    codes = torch.bucketize(scaled, (moment.code[1:] + moment.code[:-1]) / 2)
    moment.bytes.copy_(codes.flatten()[: len(values)])


def test_update_with_eight_bit_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make several steps of slots with different ranks and one infinite gradient, with small and large matrices."""
    monkeypatch.setattr(Moment, "write", write_nearest)
    layers = [[AdaptedLayer("q", 0, 256, 0, 300), AdaptedLayer("k", 1, 256, 300, 24)]]
    batch = make_batch(
        {slot: [9] for slot in range(NUM_SLOTS)},
        NUM_SLOTS,
        NUM_SLOTS,
        max_norm={0: 1.0, 1: float("inf"), 2: 1.0, 3: 1.0},
        applies=dict.fromkeys(range(NUM_SLOTS), 1),
        learning_rate=dict.fromkeys(range(NUM_SLOTS), 1e-2),
        rank=RANKS,
    )
    ours, exact = make_adapters(batch, layers, 64, eight_bit=True)
    assert ours.eight_bit is not None
    assert exact.eight_bit is not None
    began = ours.weights.clone()
    for step in range(3):
        torch.manual_seed(step)
        gradients = torch.randn_like(ours.gradients)
        clear_beyond(ours, gradients)
        gradients[3, 40] = float("inf")
        ours.gradients.copy_(gradients)
        exact.gradients.copy_(gradients)
        norms, expected = kernels.update(ours, batch), reference.update(exact, batch)
        assert_close(norms[:3], expected[:3], 1e-5)
        assert norms[3].isinf()
        assert not ours.gradients.any()
        far = ~torch.isclose(ours.weights, exact.weights, rtol=1e-4, atol=1e-5)
        assert far.float().mean() < 1e-4, "an element half way between two values may take either"
        assert_close(ours.eight_bit.absmax, exact.eight_bit.absmax, 1e-5)
        for kept, wanted in zip(moments_of(ours, batch), moments_of(exact, batch), strict=True):
            assert_close(kept.read(), wanted.read(), 5e-3)
    assert torch.equal(ours.weights[3], began[3])
    assert not ours.moment1[3].any()
    assert torch.equal((ours.weights != began)[:3], (began != 0)[:3]), (
        "all elements within a slot's rank change, and no others"
    )


def moments_of(adapters: Adapters, batch: FlatBatch) -> Iterator[Moment]:
    """Yield the moments of the three slots that have stepped."""
    assert adapters.eight_bit is not None
    for slot, rank in enumerate(batch.table["rank"].tolist()[:3]):
        for pair in adapters.eight_bit.moments(slot, rank, (adapters.moment1[slot], adapters.moment2[slot])):
            yield from pair


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
