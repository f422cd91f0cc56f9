"""The Triton kernel of clipping and AdamW, with moments in float32 and in eight bits, against `reference`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import (
    GROUPS,
    NUM_SLOTS,
    RANKS,
    assert_close,
    clear_beyond,
    kernels,
    make_adapters,
    make_batch,
)

from orchestrator.training.fast.ops import reference
from orchestrator.training.fast.ops.eight_bit import Moment
from orchestrator.training.fast.step.adapters import NO_DROPOUT, AdaptedLayer, Adapters
from orchestrator.training.fast.step.flat_batch import FlatBatch

pytestmark = pytest.mark.usefixtures("seed")


EXPERTS = [AdaptedLayer("experts", NO_DROPOUT, 200, 0, 300, num_matrices=3)]
"""Their stack rank is below the ranks of most slots, which then use all of it. At rank 8 both matrices have 4,096
elements and more, and at rank 4 less: those stay in 32 bits."""


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
    ours, exact = make_adapters(batch, [GROUPS["three"], EXPERTS, GROUPS["one, wide"]], rank)
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
    """Make several steps of slots with different ranks and one infinite gradient, with small and large matrices.

    In the first slot, a layer has a smaller rank than the other.
    """
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
    ranks = {"k": 17, EXPERTS[0].name: 5}
    ours, exact = make_adapters(batch, [EXPERTS, *layers], 64, eight_bit=True, layer_ranks=ranks)
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
        for _, pair in adapters.eight_bit_moments(slot, rank):
            yield from pair
