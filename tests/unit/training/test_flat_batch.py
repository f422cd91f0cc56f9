"""A step's tokens, laid end to end."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.training.fast.step.flat_batch import IGNORED, TABLE, BucketShape, Span, TokenizedRows

X = IGNORED


def rows_of(*lengths: int, first: int = 1) -> TokenizedRows:
    """Rows of consecutive numbers; the first token of each has no loss."""
    ids, at = [], first
    for length in lengths:
        ids.append(list(range(at, at + length)))
        at += length
    return TokenizedRows(ids, [[X, *row[1:]] for row in ids])


def table(value: float) -> dict[str, float]:
    return dict.fromkeys(TABLE, value)


def fill(layout: BucketShape, spans: list[Span], buffer: Any = None) -> Any:
    buffer = layout.buffer("cpu") if buffer is None else buffer
    layout.fill(buffer.numpy(), spans)
    return layout.row(buffer)


def test_targets_are_the_next_tokens_of_the_same_row() -> None:
    rows = TokenizedRows([[1, 2, 3], [4], [5, 6], [7, 8, 9]], [[X, 2, 3], [4], [X, 6], [X, X, 9]])
    assert [rows.targets(index).tolist() for index in range(4)] == [[2, 3, X], [X], [6, X], [X, 9, X]]
    assert [rows.ids(index).tolist() for index in range(4)] == [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    assert rows.num_targets([0, 2]) == 3
    assert rows.num_targets([1]) == 0
    assert (len(rows), rows.longest) == (4, 3)


def test_a_data_set_is_read_as_it_stands(tmp_path: Path) -> None:
    """Whatever lies between its rows and the file: other rows, another order, several pieces."""
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
def test_rows_fit_in_their_order_up_to_the_limit(max_tokens: int, count: int) -> None:
    """7, 3, 9, 2 and 6 tokens; how a batch is then split is the pack's."""
    assert rows_of(3, 9, 2, 7, 6).fitting([3, 0, 1, 2, 4], max_tokens) == count


def test_of_no_rows_none_fit_and_a_longer_one_is_not_skipped() -> None:
    assert rows_of(3, 9).fitting([], 10) == 0
    assert rows_of(1, 50, 1, 1).fitting(range(4), 10) == 1
    assert rows_of(1, 50, 1, 1).fitting(range(1, 4), 10) == 0


def test_a_step_of_two_slots() -> None:
    """Slot 2 with 3 + 2 tokens, slot 0 with 4, in tiles of 4 and a bucket of 20."""
    layout = BucketShape(num_tokens=20, num_sequences=8, num_slots=3, tile=4, longest=5)
    first, second = rows_of(3, 2), rows_of(4, first=11)
    row = fill(layout, [Span(2, first, [1, 0], table(3.0), first_token=7), Span(0, second, [0], table(5.0))])
    assert row.ids.tolist() == [4, 5, 1, 2, 3, 0, 0, 0, 11, 12, 13, 14, *[0] * 8]
    assert row.targets.tolist() == [5, X, 2, 3, X, X, X, X, 12, 13, 14, X, *[X] * 8]
    assert row.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]
    assert row.counters.tolist() == [7, 8, 9, 10, 11, 0, 0, 0, 0, 1, 2, 3, *[0] * 8]
    assert row.tiles.tolist() == [2, 2, 0, 0, 0]
    assert row.bounds.tolist() == [0, 2, 5, 8, 12, 17, 20, 20, 20]
    assert row.num_tokens == 20
    for name in TABLE:
        assert row.table[name].tolist() == [5, 0, 3], name
    assert row.table["first_tile"].tolist() == [2, 0, 0]
    assert row.table["end_tile"].tolist() == [3, 0, 2]


def test_sequences_lie_side_by_side_with_nothing_of_another_near() -> None:
    layout = BucketShape(num_tokens=24, num_sequences=8, num_slots=1, tile=8, longest=7)
    row = fill(layout, [Span(0, rows_of(7, 1, 3), [0, 1, 2], table(1.0))])
    # Three rows, the rest of a tile, the rest of a bucket.
    bounds = [0, 7, 8, 11, 16, 23, 24]
    assert row.bounds.tolist() == [*bounds, 24, 24]
    places, real = row.padded
    assert places.shape == real.shape == (6, 7)
    for (start, end), tokens, are_real in zip(pairwise(bounds), places, real, strict=True):
        assert tokens[are_real].tolist() == list(range(start, end))
        assert are_real.tolist() == [True] * (end - start) + [False] * (7 - (end - start))
        assert all(start <= token < end for token in tokens.tolist())


def test_a_table_holds_numbers_to_their_last_bit() -> None:
    layout = BucketShape(num_tokens=8, num_sequences=8, num_slots=2, tile=8, longest=8)
    values = dict(table(0.0), key=-1234567891, threshold=2**31 - 1, applies=1, learning_rate=2e-4, gain2=1 - 0.999)
    values["max_norm"] = float("inf")
    row = fill(layout, [Span(1, rows_of(4), [0], values)])
    for name, value in values.items():
        wanted = value if name in ("key", "threshold", "applies") else np.float32(value)
        assert row.table[name][1].item() == wanted, name
        assert row.table[name][0].item() == 0, name


def test_nothing_of_an_earlier_step_stays_in_a_buffer() -> None:
    layout = BucketShape(num_tokens=48, num_sequences=16, num_slots=3, tile=8, longest=12)
    spans = [Span(1, rows_of(3, 4), [0, 1], table(2.0))]
    fresh = fill(layout, spans)
    buffer = layout.buffer("cpu")
    fill(layout, [Span(2, rows_of(12, 9), [1, 0], table(9.0)), Span(0, rows_of(5, 7), [0, 1], table(8.0))], buffer)
    again = fill(layout, spans, buffer)
    for name in ("ids", "targets", "positions", "counters", "tiles", "bounds"):
        assert torch.equal(getattr(fresh, name), getattr(again, name)), name
    for name in TABLE:
        assert torch.equal(fresh.table[name], again.table[name]), name


def test_an_empty_step_is_all_filler() -> None:
    layout = BucketShape(num_tokens=16, num_sequences=8, num_slots=2, tile=8, longest=10)
    row = fill(layout, [])
    assert (row.targets == X).all()
    assert row.bounds.tolist() == [0, 10, 16, 16, 16, 16, 16, 16, 16]
    assert not any(values.any() for values in row.table.values())


PACKED = TokenizedRows([[1, 2, 3, 4, 5], [6, 7, 8, 9]], [[X, 2, X, X, 5], [X, 7, 8, 9]], [[2, 3], [4]])
"""A row of 2 and 3 tokens, and one of 4."""


def test_sequences_of_a_packed_row_have_bounds_and_positions_of_their_own() -> None:
    assert [PACKED.targets(row).tolist() for row in range(2)] == [[2, X, X, 5, X], [7, 8, 9, X]]
    span = Span(1, PACKED, [1, 0], table(2.0), first_token=3)
    assert (span.num_tokens, span.most_sequences) == (9, 5)
    layout = BucketShape(num_tokens=16, num_sequences=8, num_slots=2, tile=4, longest=5)
    row = fill(layout, [span])
    assert row.ids.tolist() == [6, 7, 8, 9, 1, 2, 3, 4, 5, *[0] * 7]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert row.bounds.tolist() == [0, 4, 6, 9, 12, 16, 16, 16, 16]
    assert row.counters.tolist()[:9] == list(range(3, 12)), "dropout counts on through the batch"
    assert row.tiles.tolist() == [1, 1, 1, 0]


def test_a_packed_data_set_is_read_with_its_bounds() -> None:
    from datasets import Dataset

    columns = {"input_ids": [[1, 2, 3], [4, 5]], "labels": [[X, 2, X], [X, 5]], "seq_lengths": [[2, 1], [2]]}
    rows = TokenizedRows.of(Dataset.from_dict(columns).select([1, 0]))
    assert [rows.ends(row).tolist() for row in range(2)] == [[2], [2, 3]]
    assert rows.most_parts == 2
    plain = TokenizedRows.of(Dataset.from_dict({name: columns[name] for name in ("input_ids", "labels")}))
    assert [plain.ends(row).tolist() for row in range(2)] == [[3], [2]]
    assert plain.most_parts == 1
