"""What a model is about to be trained on: its rows, what is cut or dropped, how long they are."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from orchestrator.base import load_tokenizer
from orchestrator.data.prepare import Say, TokenRow, TokenRows, fingerprint, tokenise
from orchestrator.data.stops import RowEnds
from orchestrator.record import BadRows, SourceRows
from orchestrator.record.models import Record
from orchestrator.spec.sections import BaseSection, DataSection

_MOST_BINS = 12


class Piece(Record):
    """Tokens of a row that are alike."""

    text: str
    num_tokens: int
    is_trained: bool
    """Whether they are in the loss."""
    is_special: bool


class ShownRow(Record):
    """A row as the model sees it."""

    where: str
    sequence: int | None
    """That it is packed into, from 0 on."""
    num_tokens: int
    num_trained: int
    """Tokens in the loss."""
    num_cut: int
    """Tokens that were cut off."""
    ids: list[int]
    trained: list[bool]
    """Of each token, whether it is in the loss."""
    pieces: list[Piece]


class Place(Record):
    """A row that does not stay whole."""

    where: str
    num_tokens: int
    """Of all of it."""


class Bin(Record):
    """Rows of like length."""

    up_to: int
    """Tokens; more than in the bin before."""
    num_rows: int


class Packing(Record):
    """Training rows in sequences."""

    num_sequences: int
    filled: float
    """Share of max_length tokens, on average."""
    most_rows: int
    """In one sequence."""


class Ends(Record):
    """How the training rows end."""

    stop_tokens: list[str]
    """Tokens at which an answer is over."""
    num_ended: int
    """Rows that learn to write one at their end."""
    num_not_learned: int
    """Rows that end with one which is not in the loss."""
    num_cut: int
    """Rows that lose theirs to max_length."""
    num_without: int
    """Rows that end with none."""


class DataPreview(Record):
    """What `orchestrator data` shows."""

    base: str
    """Whose tokenizer reads the rows."""
    format: str
    loss_on: str
    max_length: int
    truncate: str
    sources: list[SourceRows]
    num_train: int
    """Training rows, without those that are dropped."""
    num_held_out: int
    num_shared: int
    """Held-out rows that are training rows too, token for token."""
    num_tokens: int
    """Of an epoch."""
    num_trained: int
    """Tokens of an epoch that are in the loss."""
    lengths: list[Bin]
    """Of all rows, before the cut."""
    median: int
    longest: int
    cut: list[Place]
    dropped: list[Place]
    """Rows of which nothing in the loss is left."""
    bad: list[BadRows]
    """Rows that the format cannot read, and that are left out."""
    unread: dict[str, int]
    """What rows hold and nothing reads: column, or key of turns -> rows that have it."""
    packing: Packing | None
    ends: Ends
    require_stop: bool
    fingerprint: str
    rows: list[ShownRow]


def preview(data: DataSection, base: BaseSection, num_rows: int, say: Say = lambda _: None) -> DataPreview:
    """Everything a sweep would do with its data, but for keeping it.

    Args:
        data: the section.
        base: whose tokenizer reads the rows.
        num_rows: training rows to show, the first; packed ones by their sequences.
        say: hears of progress.

    Raises:
        DataError: a row or a source is not what the section says.
    """
    tokenizer = load_tokenizer(base, data.chat_template)
    rows = tokenise(data, tokenizer, say)
    every = [*rows.train, *rows.held_out]
    lengths = sorted(len(row.tokens.ids) for row in every)
    kept = rows.kept
    return DataPreview(
        base=base.model,
        format=data.format,
        loss_on=data.loss_on,
        max_length=data.max_length,
        truncate=data.truncate,
        sources=rows.sources,
        num_train=len(kept),
        num_held_out=len(rows.kept_held_out),
        num_shared=rows.num_shared,
        num_tokens=sum(len(row.ids) for row in kept),
        num_trained=sum(row.num_trained for row in kept),
        lengths=_bins(lengths),
        median=lengths[len(lengths) // 2],
        longest=lengths[-1],
        cut=[_place(row) for row in every if row.num_cut and row.kept is not None],
        dropped=[_place(row) for row in every if row.kept is None],
        bad=rows.bad,
        unread=rows.unread,
        packing=_packing(rows, data.max_length),
        ends=_ends(rows.ends, tokenizer),
        require_stop=data.require_stop,
        fingerprint=fingerprint(rows, data),
        rows=[_shown(row, sequence, tokenizer) for row, sequence in _first(rows, num_rows)],
    )


def pieces(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> list[Piece]:
    """Runs of tokens that are trained or not, special or not, with their text."""
    special = set(tokenizer.all_special_ids)
    found, at, given = [], 0, 0
    for (is_trained, is_special), run in groupby(
        zip(ids, trained, strict=True), key=lambda each: (each[1], each[0] in special)
    ):
        count = len(list(run))
        at += count
        # What a run adds to the whole: by itself it might lose a space.
        whole = str(tokenizer.decode(ids[:at], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if at < len(ids):
            whole = whole.rstrip("\ufffd")  # a letter that is not whole yet
        found.append(Piece(text=whole[given:], num_tokens=count, is_trained=is_trained, is_special=is_special))
        given = len(whole)
    return found


def _first(rows: TokenRows, num_rows: int) -> list[tuple[TokenRow, int | None]]:
    kept = [row for row in rows.train if row.kept is not None]
    if rows.sequences is None:
        return [(row, None) for row in kept[:num_rows]]
    laid: list[tuple[TokenRow, int | None]] = []
    for number, sequence in enumerate(rows.sequences):
        laid += [(kept[i], number) for i in sequence]
    return laid[:num_rows]


def _shown(row: TokenRow, sequence: int | None, tokenizer: Any) -> ShownRow:
    assert row.kept is not None
    ids, trained = row.kept.ids, row.kept.trained
    return ShownRow(
        where=row.where,
        sequence=sequence,
        num_tokens=len(ids),
        num_trained=row.kept.num_trained,
        num_cut=row.num_cut,
        ids=ids,
        trained=trained,
        pieces=pieces(ids, trained, tokenizer),
    )


def _place(row: TokenRow) -> Place:
    return Place(where=row.where, num_tokens=len(row.tokens.ids))


def _packing(rows: TokenRows, max_length: int) -> Packing | None:
    if rows.sequences is None:
        return None
    tokens = sum(len(row.ids) for row in rows.kept)
    return Packing(
        num_sequences=len(rows.sequences),
        filled=round(tokens / (len(rows.sequences) * max_length), 4),
        most_rows=max(len(sequence) for sequence in rows.sequences),
    )


def _ends(ends: RowEnds, tokenizer: Any) -> Ends:
    return Ends(
        stop_tokens=[str(token) for token in tokenizer.convert_ids_to_tokens(ends.stop_tokens)],
        num_ended=ends.num_ended,
        num_not_learned=ends.num_not_learned,
        num_cut=ends.num_cut,
        num_without=ends.num_rows - ends.num_ended - ends.num_not_learned - ends.num_cut,
    )


def _bins(lengths: Sequence[int]) -> list[Bin]:
    """At most `_MOST_BINS` of one width: 1, 2 or 5 times a power of ten; those without rows are there too."""
    least = lengths[-1] / _MOST_BINS
    power = 10 ** math.floor(math.log10(max(least, 1)))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    first, last = (lengths[0] - 1) // width, (lengths[-1] - 1) // width
    counts = dict.fromkeys(range(first, last + 1), 0)
    for length in lengths:
        counts[(length - 1) // width] += 1
    return [Bin(up_to=(place + 1) * width, num_rows=count) for place, count in counts.items()]
