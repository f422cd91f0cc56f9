"""The flat batch: the tokens of a step end to end."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.training.fast.step.flat_batch import IGNORED, TABLE, BucketShape, Span, TokenizedRows

X = IGNORED


def rows_of(*lengths: int, first: int = 1) -> TokenizedRows:
    """Make rows of consecutive numbers; the first token of each has no loss."""
    ids, at = [], first
    for length in lengths:
        ids.append(list(range(at, at + length)))
        at += length
    return TokenizedRows(ids, [[X, *row[1:]] for row in ids])


def table(value: float) -> dict[str, float]:
    return dict.fromkeys(TABLE, value)


def fill(shape: BucketShape, spans: list[Span], buffer: Any = None) -> Any:
    buffer = shape.buffer("cpu") if buffer is None else buffer
    shape.fill(buffer.numpy(), spans)
    return shape.view(buffer)


def test_targets_are_the_next_tokens_of_the_same_row() -> None:
    rows = TokenizedRows([[1, 2, 3], [4], [5, 6], [7, 8, 9]], [[X, 2, 3], [4], [X, 6], [X, X, 9]])
    assert [rows.targets(index).tolist() for index in range(4)] == [[2, 3, X], [X], [6, X], [X, 9, X]]
    assert [rows.ids(index).tolist() for index in range(4)] == [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    assert rows.num_targets([0, 2]) == 3
    assert rows.num_targets([1]) == 0
    assert (len(rows), rows.longest) == (4, 3)


def test_a_data_set_is_read_in_its_own_order(tmp_path: Path) -> None:
    """Read data sets that select rows, change their order, or consist of several pieces."""
    from datasets import Dataset, concatenate_datasets, load_from_disk

    ids = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11, 12]]
    labels = [[X, *row[1:]] for row in ids]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": labels})
    pieces = concatenate_datasets([dataset.select([3, 0]), dataset.select(range(1, 3))])
    dataset.save_to_disk(tmp_path / "rows")
    for found, order in ((dataset, range(5)), (pieces, [3, 0, 1, 2]), (load_from_disk(tmp_path / "rows"), range(5))):
        rows, expected = TokenizedRows.of(found), TokenizedRows([ids[i] for i in order], [labels[i] for i in order])
        assert rows.lengths.tolist() == expected.lengths.tolist()
        for index in range(len(expected)):
            assert rows.ids(index).tolist() == expected.ids(index).tolist()
            assert rows.targets(index).tolist() == expected.targets(index).tolist()


@pytest.mark.parametrize(
    ("max_tokens", "count"),
    [(100, 5), (27, 5), (26, 4), (21, 4), (20, 3), (10, 2), (9, 1), (7, 1), (6, 0), (0, 0), (-5, 0)],
)
def test_fitting_counts_rows_in_order_up_to_the_limit(max_tokens: int, count: int) -> None:
    """The rows have 7, 3, 9, 2 and 6 tokens in this order."""
    assert rows_of(3, 9, 2, 7, 6).fitting([3, 0, 1, 2, 4], max_tokens) == count


def test_fitting_accepts_no_rows_and_does_not_skip_a_long_one() -> None:
    assert rows_of(3, 9).fitting([], 10) == 0
    assert rows_of(1, 50, 1, 1).fitting(range(4), 10) == 1
    assert rows_of(1, 50, 1, 1).fitting(range(1, 4), 10) == 0


def test_a_step_of_two_slots() -> None:
    """Lay out slot 2 with 2 + 3 tokens and slot 0 with 4, in tiles of 4 and a bucket of 20."""
    shape = BucketShape(num_tokens=20, max_targets=8, num_sequences=8, num_slots=3, tile=4, max_seqlen=5)
    first, second = rows_of(3, 2), rows_of(4, first=11)
    batch = fill(shape, [Span(2, first, [1, 0], table(3.0), first_token=7), Span(0, second, [0], table(5.0))])
    assert batch.ids.tolist() == [4, 5, 1, 2, 3, 0, 0, 0, 11, 12, 13, 14, *[0] * 8]
    assert batch.targets.tolist() == [5, X, 2, 3, X, X, X, X, 12, 13, 14, X, *[X] * 8]
    assert batch.target_tokens.tolist() == [0, 2, 3, 8, 9, 10, 20, 20]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.dropout_positions.tolist() == [7, 8, 9, 10, 11, 0, 0, 0, 0, 1, 2, 3, *[0] * 8]
    assert batch.tile_slots.tolist() == [2, 2, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 8, 12, 17, 20, 20, 20]
    assert batch.num_tokens == 20
    for name in TABLE:
        assert batch.table[name].tolist() == [5, 0, 3], name
    assert batch.table["first_tile"].tolist() == [2, 0, 0]
    assert batch.table["end_tile"].tolist() == [3, 0, 2]


def test_padded_sequences_contain_no_token_of_another() -> None:
    shape = BucketShape(num_tokens=24, max_targets=24, num_sequences=8, num_slots=1, tile=8, max_seqlen=7)
    batch = fill(shape, [Span(0, rows_of(7, 1, 3), [0, 1, 2], table(1.0))])
    # Three rows, the padding of a tile, the padding of the bucket.
    bounds = [0, 7, 8, 11, 16, 23, 24]
    assert batch.cu_seqlens.tolist() == [*bounds, 24, 24]
    places, real = batch.padded
    assert places.shape == real.shape == (6, 7)
    for (start, end), tokens, are_real in zip(pairwise(bounds), places, real, strict=True):
        assert tokens[are_real].tolist() == list(range(start, end))
        assert are_real.tolist() == [True] * (end - start) + [False] * (7 - (end - start))
        assert all(start <= token < end for token in tokens.tolist())


def test_a_table_keeps_every_bit_of_a_number() -> None:
    shape = BucketShape(num_tokens=8, max_targets=8, num_sequences=8, num_slots=2, tile=8, max_seqlen=8)
    values = dict(
        table(0.0), key=-1234567891, threshold=2**31 - 1, applies=1, learning_rate=2e-4, one_minus_beta2=1 - 0.999
    )
    values["max_norm"] = float("inf")
    batch = fill(shape, [Span(1, rows_of(4), [0], values)])
    for name, value in values.items():
        wanted = value if name in ("key", "threshold", "applies") else np.float32(value)
        assert batch.table[name][1].item() == wanted, name
        assert batch.table[name][0].item() == 0, name


def test_a_buffer_keeps_nothing_of_an_earlier_step() -> None:
    shape = BucketShape(num_tokens=48, max_targets=48, num_sequences=16, num_slots=3, tile=8, max_seqlen=12)
    spans = [Span(1, rows_of(3, 4), [0, 1], table(2.0))]
    fresh = fill(shape, spans)
    buffer = shape.buffer("cpu")
    fill(shape, [Span(2, rows_of(12, 9), [1, 0], table(9.0)), Span(0, rows_of(5, 7), [0, 1], table(8.0))], buffer)
    again = fill(shape, spans, buffer)
    for name in ("ids", "targets", "positions", "dropout_positions", "tile_slots", "cu_seqlens"):
        assert torch.equal(getattr(fresh, name), getattr(again, name)), name
    for name in TABLE:
        assert torch.equal(fresh.table[name], again.table[name]), name


def test_an_empty_step_is_all_padding() -> None:
    shape = BucketShape(num_tokens=16, max_targets=16, num_sequences=8, num_slots=2, tile=8, max_seqlen=10)
    batch = fill(shape, [])
    assert (batch.targets == X).all()
    assert batch.cu_seqlens.tolist() == [0, 10, 16, 16, 16, 16, 16, 16, 16]
    assert not any(values.any() for values in batch.table.values())


PACKED = TokenizedRows([[1, 2, 3, 4, 5], [6, 7, 8, 9]], [[X, 2, X, X, 5], [X, 7, 8, 9]], [[2, 3], [4]])
"""A row of 2 and 3 tokens, and one of 4."""


def test_sequences_of_a_packed_row_have_their_own_bounds_and_positions() -> None:
    assert [PACKED.targets(row).tolist() for row in range(2)] == [[2, X, X, 5, X], [7, 8, 9, X]]
    span = Span(1, PACKED, [1, 0], table(2.0), first_token=3)
    assert (span.num_tokens, span.max_sequences) == (9, 5)
    shape = BucketShape(num_tokens=16, max_targets=16, num_sequences=8, num_slots=2, tile=4, max_seqlen=5)
    batch = fill(shape, [span])
    assert batch.ids.tolist() == [6, 7, 8, 9, 1, 2, 3, 4, 5, *[0] * 7]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 9, 12, 16, 16, 16, 16]
    assert batch.dropout_positions.tolist()[:9] == list(range(3, 12)), "dropout positions continue through the batch"
    assert batch.tile_slots.tolist() == [1, 1, 1, 0]


def test_a_packed_data_set_is_read_with_its_sequence_lengths() -> None:
    from datasets import Dataset

    columns = {"input_ids": [[1, 2, 3], [4, 5]], "labels": [[X, 2, X], [X, 5]], "seq_lengths": [[2, 1], [2]]}
    rows = TokenizedRows.of(Dataset.from_dict(columns).select([1, 0]))
    assert [rows.sequence_ends(row).tolist() for row in range(2)] == [[2], [2, 3]]
    assert rows.max_sequences == 2
    plain = TokenizedRows.of(Dataset.from_dict({name: columns[name] for name in ("input_ids", "labels")}))
    assert [plain.sequence_ends(row).tolist() for row in range(2)] == [[3], [2]]
    assert plain.max_sequences == 1
