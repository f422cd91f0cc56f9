"""The dropout masks of `reference`: their rates, their independence, and what they depend on."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.training.fast.drive.slot import dropout_key
from orchestrator.training.fast.ops import reference
from orchestrator.training.fast.step.flat_batch import FlatBatch, Span, TokenizedRows

MakeRows = Callable[..., TokenizedRows]
MakeTable = Callable[..., dict[str, float]]
MakeRow = Callable[..., FlatBatch]


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
    batch = FlatBatch(nothing, nothing, nothing, nothing, positions, nothing[:1], nothing, table, tokens)
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
