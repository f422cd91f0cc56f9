"""Each Triton kernel does what its plain counterpart does: on a GPU if there is one, else in Triton's interpreter."""

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
from orchestrator.training.fast.ops.triton.launch import FULL  # noqa: E402
from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters  # noqa: E402
from orchestrator.training.fast.step.flat_batch import BucketShape, FlatBatch, Span, TokenizedRows  # noqa: E402

PACKAGE = "orchestrator.training.fast.ops.triton"
LEAVES = (
    "launch", "lora_common", "lora_forward", "lora_backward", "attention",
    "adamw", "norm_swiglu_ce",
)  # fmt: skip
MODULES = [f"{PACKAGE}.{leaf}" for leaf in LEAVES]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-5
"""Of the difference's norm to the reference's, the reference in float32."""
NUM_SLOTS = 4
RANKS = {0: 50, 1: 16, 2: 4, 3: 20, 4: 64, 5: 8, 6: 33, 7: 12}
"""Of several slots, as far as the stack goes."""


def load_kernels() -> ModuleType:
    """The kernels; without a GPU, copies of them and of Triton that interpret, out of other tests' sight."""
    if ON_GPU:
        return importlib.import_module(MODULES[-1])

    def take() -> dict[str, ModuleType]:
        return {
            name: sys.modules.pop(name)
            for name in list(sys.modules)
            if name in MODULES or (name.split(".")[0] == "triton" and not name.startswith("triton._C"))
        }

    package, others, before = importlib.import_module(PACKAGE), take(), os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        kernels = importlib.import_module(MODULES[-1])
        mend_interpreter(importlib.import_module("triton.runtime.interpreter"))
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        take()
        sys.modules.update(others)
        for name in MODULES:
            leaf = name.removeprefix(f"{PACKAGE}.")
            vars(package).pop(leaf, None)
            if name in others:
                setattr(package, leaf, others[name])
    return kernels


def mend_interpreter(interpreter: Any) -> None:
    """NumPy 2.4 takes no array of one element for an integer, which Triton 3.6 relies on."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


kernels = load_kernels()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_row(lengths: dict[int, list[int]], num_tiles: int, num_slots: int, **table: Any) -> FlatBatch:
    """A step of these sequences by slot; `table` gives each slot's values, or one for all."""
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
            "decay": 0.1,
            "gain1": 0.1,
            "gain2": 0.01,
            "epsilon": 1e-8,
            "correction1": 0.1,
            "correction2": 0.01,
            "max_norm": 1.0,
        }
        values |= {name: value[slot] if isinstance(value, dict) else value for name, value in table.items()}
        spans.append(Span(slot, TokenizedRows(ids, labels), range(len(ids)), values, first_token=17))
    layout = BucketShape(num_tiles * kernels.TILE, 16, num_slots, kernels.TILE, 100)
    buffer = layout.buffer("cpu")
    layout.fill(buffer.numpy(), spans)
    return layout.row(buffer.to(DEVICE))


def dropout(probability: float) -> tuple[int, float]:
    return int(probability * 2**31), 1 / (1 - probability)


def several_slots(num_slots: int = NUM_SLOTS) -> FlatBatch:
    """Out of order, some idle, one with no dropout, and a tile of fillers that bears the first slot's number."""
    drops = {0: dropout(0.5), 2: dropout(0.1), 3: dropout(0.0)}
    return make_row(
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
    return make_row({0: [5, 61, 30]}, 2, 1, threshold=threshold, keep_scale=keep_scale, scale=0.5)


def full_pack() -> FlatBatch:
    """Kernels are made for it in other ways."""
    return several_slots(FULL)


ROWS: list[Callable[[], FlatBatch]] = [one_slot, several_slots, full_pack]


def is_real(row: FlatBatch) -> Any:
    """(T, 1): 0 at fillers, whose gradients vanish in a step."""
    return (row.counters > 0).to(DTYPE)[:, None]


def random(*shape: int, dtype: Any = DTYPE) -> Any:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(value: Any, exact: Any, tolerance: float = TOLERANCE) -> None:
    assert value.shape == exact.shape
    error = (value.float() - exact.float()).norm() / exact.float().norm()
    assert error <= tolerance, f"differs by {float(error):.2e} of the norm"


def make_adapters(
    row: FlatBatch, groups: list[list[AdaptedLayer]], rank: int, dtype: Any = torch.float32, eight_bit: bool = False
) -> tuple[Any, Any]:
    """Adapters for the kernels and the same in float32 for the reference; of several slots, each of its own rank."""
    num_slots = len(row.table["key"])
    ours, exact = (
        Adapters(groups, num_slots, rank, dtype, compute, DEVICE, eight_bit) for compute in (DTYPE, torch.float32)
    )
    ours.weights.normal_()
    row.table["rank"].clamp_(max=rank)
    clear_beyond(ours, ours.weights)
    exact.weights.copy_(ours.weights)
    return ours, exact


def clear_beyond(adapters: Adapters, flat: Any) -> None:
    """Zeros wherever no matrix of a slot's own rank lies, as in all that belongs to it."""
    whole = flat.clone()
    flat.zero_()
    for slot in range(adapters.num_slots):
        own = min(RANKS[slot], adapters.rank) if adapters.num_slots > 1 else adapters.rank
        for group in filter(None, adapters.places):
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
    gradient, by_normed, states, weight = random(5, 100), random(5, 100), random(5, 100), random(100)
    root = reference.add_norm(states, None, weight, 1e-5)[2]
    inputs = (gradient, by_normed, states, root, weight)
    assert_close(kernels.add_norm_backward(*inputs), reference.add_norm_backward(*inputs))


def test_swiglu_and_its_backward() -> None:
    gate_up, gradient = random(5, 2 * 1100), random(5, 1100)
    assert_close(kernels.swiglu(gate_up), reference.swiglu(gate_up))
    assert_close(kernels.swiglu_backward(gradient, gate_up), reference.swiglu_backward(gradient, gate_up))


@pytest.mark.parametrize("queries", [2, 6])
@pytest.mark.parametrize("make", ROWS)
def test_attention_and_its_backward(make: Callable[[], FlatBatch], queries: int) -> None:
    row, size = make(), 32
    angles = torch.arange(100, device=DEVICE)[:, None] / 10 ** torch.linspace(0, 3, size // 2, device=DEVICE)
    angles = torch.cat((angles, angles), 1)
    heads = reference.Heads(queries, 2, size, angles.cos().to(DTYPE), angles.sin().to(DTYPE))
    wide = reference.Heads(queries, 2, size, heads.cos.float(), heads.sin.float())
    qkv, gradient = random(row.num_tokens, (queries + 4) * size), random(row.num_tokens, queries * size)
    output, attended = kernels.attention(qkv.clone(), row, heads)
    exact, reference_attended = reference.attention(qkv.float(), row, wide)
    assert_close(output, exact)
    by_qkv = kernels.attention_backward(gradient, attended, row, heads)
    assert_close(by_qkv, reference.attention_backward(gradient.float(), reference_attended, row, wide))


def test_attention_does_not_spread_what_is_not_finite() -> None:
    row = several_slots()
    angles = torch.zeros(100, 32, device=DEVICE, dtype=DTYPE)
    heads = reference.Heads(2, 2, 32, angles, angles)
    qkv, gradient = random(row.num_tokens, 6 * 32), random(row.num_tokens, 2 * 32)
    sick = (row.tiles == 2).repeat_interleave(kernels.TILE)
    qkv[sick] = float("nan")
    output, attended = kernels.attention(qkv, row, heads)
    by_qkv = kernels.attention_backward(gradient, attended, row, heads)
    assert output[~sick].isfinite().all()
    assert by_qkv[~sick].isfinite().all()


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written to holds NaN."""

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
@pytest.mark.parametrize("make", ROWS)
def test_adapters_and_their_backward(make: Callable[[], FlatBatch], group: str, rank: int) -> None:
    """Of each slot's own rank: what the stack has beyond is not read."""
    row, layers = make(), GROUPS[group]
    ours, exact = make_adapters(row, [layers], rank)
    live = (torch.arange(rank, device=DEVICE) < row.table["rank"][row.owners][:, None]).repeat(1, len(layers))
    place = ours.places[0]
    width = max(layer.column + layer.width for layer in layers)
    x, y = random(row.num_tokens, place.in_features), random(row.num_tokens, width)
    low, expected_low = kernels.lora_down(x, ours, place, row), reference.lora_down(x.float(), exact, place, row)
    assert_close(low.where(live, 0), expected_low)
    expected = y.to(torch.float32, copy=True)
    kernels.lora_up_(y, low, ours, place, row)
    reference.lora_up_(expected, expected_low, exact, place, row)
    assert_close(y, expected)

    by_x, gradient = random(*x.shape), random(*y.shape) * is_real(row)
    expected = by_x.to(torch.float32, copy=True)
    for adapters in (ours, exact):  # gradients add up
        torch.manual_seed(1)
        adapters.gradients.normal_()
    before = ours.gradients.clone()
    kernels.lora_backward(gradient, x, low, by_x, ours, place, row)
    reference.lora_backward(gradient.float(), x.float(), expected_low, expected, exact, place, row)
    assert_close(by_x, expected)
    for slot in range(ours.num_slots):
        if slot in row.tiles:
            for view in (ours.a, ours.b):
                own, others = (view(place, flat - before)[slot] for flat in (ours.gradients, exact.gradients))
                assert_close(own, others, max(TOLERANCE, 1e-4))
        else:
            assert torch.equal(ours.gradients[slot], before[slot])


def test_wide_ranks_and_stored_bfloat16() -> None:
    row, layers = one_slot(), GROUPS["two of three"]
    ours, exact = make_adapters(row, [layers], 128, torch.bfloat16 if ON_GPU else torch.float32)
    place = ours.places[0]
    x, by_x, gradient = (
        random(row.num_tokens, 72),
        random(row.num_tokens, 72),
        random(row.num_tokens, 88) * is_real(row),
    )
    low, expected_low = kernels.lora_down(x, ours, place, row), reference.lora_down(x.float(), exact, place, row)
    assert_close(low, expected_low)
    expected = by_x.to(torch.float32, copy=True)
    kernels.lora_backward(gradient, x, low, by_x, ours, place, row)
    reference.lora_backward(gradient.float(), x.float(), expected_low, expected, exact, place, row)
    assert_close(by_x, expected)
    assert_close(ours.gradients, exact.gradients)


def test_masks_are_the_same_bit_for_bit() -> None:
    row = make_row({1: [70], 0: [60]}, 3, 2, threshold={0: dropout(0.3)[0], 1: dropout(0.9)[0]})
    numbers = (0, 7, 153)
    layers = [AdaptedLayer(str(number), number, 48, 48 * number, 48) for number in numbers]
    adapters, _ = make_adapters(row, [layers], 64)
    place = adapters.places[0]
    adapters.a(place, adapters.weights)[:] = torch.eye(64, 48, device=DEVICE).repeat(3, 1)
    low = kernels.lora_down(torch.ones(row.num_tokens, 48, dtype=DTYPE, device=DEVICE), adapters, place, row)
    for number, masks in zip(numbers, low.unflatten(1, (3, 64)).unbind(1), strict=True):
        assert torch.equal(masks[:, :48] != 0, reference.dropout_mask(row, number, 48))


def test_a_slot_that_is_not_finite_stays_alone() -> None:
    row = several_slots()
    ours, _ = make_adapters(row, [GROUPS["three"]], 16)
    place = ours.places[0]
    ours.weights[2] = float("nan")
    x, y, by_x = random(row.num_tokens, 72), random(row.num_tokens, 88), random(row.num_tokens, 72)
    low = kernels.lora_down(x, ours, place, row)
    kernels.lora_up_(y, low, ours, place, row)
    kernels.lora_backward(y, x, low, by_x, ours, place, row)
    sick = (row.tiles == 2).repeat_interleave(kernels.TILE)
    for values in (low, y, by_x):
        assert values[sick].isnan().any()
        assert values[~sick].isfinite().all()
    assert ours.gradients[2].isnan().any()
    assert ours.gradients[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("max_logits", [1 << 26, 50 * 4200])
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, max_logits: int) -> None:
    monkeypatch.setattr(kernels, "MAX_LOGITS", max_logits)
    row = make_row({1: [30], 0: [20]}, 2, 2, loss_weight={0: 0.3, 1: 0.01})
    states, head = random(row.num_tokens, 32), random(4200, 32)
    with torch.no_grad():  # some targets are the likeliest
        head[row.targets[:10].clamp(min=0).long()] = states[:10]
    logits = states @ head.T  # as the kernel rounds them
    for trains in (True, False):
        losses, hits, gradient = kernels.cross_entropy(states, head, row, trains)
        expected_losses, expected_hits, expected = reference.cross_entropy(states, head, row, trains)
        assert_close(losses, expected_losses)
        likeliest = (logits.float().argmax(-1) == row.targets) if ON_GPU else expected_hits.bool()
        assert torch.equal(hits.bool(), likeliest)
        assert hits.any()
        assert (losses[row.targets == -100] == 0).all()
        if trains:
            assert_close(gradient, expected)
        else:
            assert gradient is None


def test_the_first_of_those_equally_likely_counts() -> None:
    row = make_row({0: [40]}, 1, 1)
    states, head = (torch.randint(-2, 3, (size, 4), device=DEVICE).to(DTYPE) for size in (kernels.TILE, 100))
    logits = states.float() @ head.float().T  # small integers, so that many are equal
    likeliest, index = logits == logits.max(1, keepdim=True).values, torch.arange(100, device=DEVICE)
    first, last = (likeliest * (100 - index)).argmax(1), (likeliest * (1 + index)).argmax(1)
    row.targets[:20], row.targets[20:40] = first[:20].int(), last[20:40].int()
    hits = kernels.cross_entropy(states, head, row, False)[1]
    assert hits[:20].all()
    assert torch.equal(hits[20:40].bool(), (first == last)[20:40])
    assert not hits[20:40].all()


def test_sum_by_slot() -> None:
    row = several_slots()
    values = random(row.num_tokens, dtype=torch.float32)
    assert_close(kernels.sum_by_slot(values, row, NUM_SLOTS), reference.sum_by_slot(values, row, NUM_SLOTS), 1e-5)


@pytest.mark.parametrize("rank", [16, 64])
def test_update(rank: int) -> None:
    """Clipped, not clipped, waiting, not finite: each slot for itself, at its own rank."""
    row = make_row(
        {slot: [9] for slot in range(NUM_SLOTS)},
        NUM_SLOTS,
        NUM_SLOTS,
        max_norm={0: 1.0, 1: float("inf"), 2: 1.0, 3: 1.0},
        applies={0: 1, 1: 1, 2: 0, 3: 1},
        learning_rate={0: 1e-2, 1: 1e-3, 2: 1e-2, 3: 1e-2},
        rank=RANKS,
    )
    ours, exact = make_adapters(row, [GROUPS["three"], GROUPS["one, wide"]], rank)
    for adapters in (ours, exact):
        torch.manual_seed(1)
        for flat in (adapters.moment1, adapters.gradients):
            flat.normal_()
        adapters.moment2.uniform_()
        for flat in (adapters.moment1, adapters.moment2, adapters.gradients):
            clear_beyond(adapters, flat)
        adapters.gradients[3, 40] = float("nan")
    before = [flat.clone() for flat in (ours.weights, ours.moment1, ours.moment2)]
    norms, expected = kernels.update(ours, row), reference.update(exact, row)
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
    """On a CPU bitsandbytes (0.50) takes a neighbour for up to 3 of 100; the kernel never does."""
    if moment.magnitudes is None:
        moment.bytes.view(torch.float32).copy_(values)
        return
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(-1, 256)
    moment.magnitudes.copy_(blocks.abs().amax(1))
    scaled = blocks / moment.magnitudes.where(moment.magnitudes > 0, 1.0)[:, None]
    codes = torch.bucketize(scaled, (moment.map[1:] + moment.map[:-1]) / 2)
    moment.bytes.copy_(codes.flatten()[: len(values)])


def test_update_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of slots of unequal ranks, one of which is not finite: some matrices are small, some are not."""
    monkeypatch.setattr(Moment, "write", write_nearest)
    layers = [[AdaptedLayer("q", 0, 256, 0, 300), AdaptedLayer("k", 1, 256, 300, 24)]]
    row = make_row(
        {slot: [9] for slot in range(NUM_SLOTS)},
        NUM_SLOTS,
        NUM_SLOTS,
        max_norm={0: 1.0, 1: float("inf"), 2: 1.0, 3: 1.0},
        applies=dict.fromkeys(range(NUM_SLOTS), 1),
        learning_rate=dict.fromkeys(range(NUM_SLOTS), 1e-2),
        rank=RANKS,
    )
    ours, exact = make_adapters(row, layers, 64, eight_bit=True)
    assert ours.eight is not None
    assert exact.eight is not None
    began = ours.weights.clone()
    for step in range(3):
        torch.manual_seed(step)
        gradients = torch.randn_like(ours.gradients)
        clear_beyond(ours, gradients)
        gradients[3, 40] = float("inf")
        ours.gradients.copy_(gradients)
        exact.gradients.copy_(gradients)
        norms, expected = kernels.update(ours, row), reference.update(exact, row)
        assert_close(norms[:3], expected[:3], 1e-5)
        assert norms[3].isinf()
        assert not ours.gradients.any()
        far = ~torch.isclose(ours.weights, exact.weights, rtol=1e-4, atol=1e-5)
        assert far.float().mean() < 1e-4, "an element may lie half way between two values, of which one is taken"
        assert_close(ours.eight.magnitudes, exact.eight.magnitudes, 1e-5)
        for kept, wanted in zip(moments_of(ours, row), moments_of(exact, row), strict=True):
            assert_close(kept.read(), wanted.read(), 5e-3)
    assert torch.equal(ours.weights[3], began[3])
    assert not ours.moment1[3].any()
    assert torch.equal((ours.weights != began)[:3], (began != 0)[:3]), "all of a slot's own, and no more"


def moments_of(adapters: Adapters, row: FlatBatch) -> Iterator[Moment]:
    """Of all slots that have stepped."""
    assert adapters.eight is not None
    for slot, rank in enumerate(row.table["rank"].tolist()[:3]):
        for pair in adapters.eight.moments(slot, rank, (adapters.moment1[slot], adapters.moment2[slot])):
            yield from pair


def test_the_same_twice() -> None:
    """No sum depends on which program comes first."""
    row, layers = one_slot(), GROUPS["one, wide"]
    results = []
    for _ in range(2):
        torch.manual_seed(2)
        ours, _ = make_adapters(row, [layers], 16)
        place = ours.places[0]
        x, gradient = random(row.num_tokens, place.in_features), random(row.num_tokens, place.width)
        low = kernels.lora_down(x, ours, place, row)
        by_x = torch.zeros_like(x)
        kernels.lora_backward(gradient, x, low, by_x, ours, place, row)
        results.append((low, by_x, ours.gradients))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
