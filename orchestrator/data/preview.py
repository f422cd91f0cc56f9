"""Preview what a model will be trained on: its rows, what is cut or dropped, and how long rows are."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from orchestrator.base import load_tokenizer
from orchestrator.data.long_rows import load_position_limit
from orchestrator.data.prepare import EncodedRow, EncodedRows, Say, fingerprint, tokenize
from orchestrator.data.render import Example, render
from orchestrator.data.sources import read_rows
from orchestrator.data.stop_tokens import RowEnds
from orchestrator.record import BadRows, SourceRows
from orchestrator.record.models import Record
from orchestrator.spec.sections import BaseSection, DataSection

_MAX_BINS = 12


class Piece(Record):
    """A run of tokens of a row that are alike."""

    text: str
    num_tokens: int
    is_trained: bool
    """Whether the tokens are in the loss."""
    is_special: bool


class ShownRow(Record):
    """A row as the model sees it."""

    where: str
    sequence: int | None
    """Index of the sequence into which the row is packed, from 0; None without packing."""
    num_tokens: int
    num_trained: int
    """Tokens in the loss."""
    num_cut: int
    """Tokens that were cut off."""
    ids: list[int]
    trained: list[bool]
    """For each token, whether it is in the loss."""
    pieces: list[Piece]


class Place(Record):
    """A row that is cut or dropped."""

    where: str
    num_tokens: int
    """Tokens of the whole row."""


class Bin(Record):
    """Rows of similar length."""

    up_to: int
    """Maximum number of tokens; the minimum is one more than that of the bin before."""
    num_rows: int


class Packing(Record):
    """How training rows are packed into sequences."""

    num_sequences: int
    filled: float
    """Average share of max_length tokens that is used."""
    most_rows: int
    """Largest number of rows in one sequence."""


class Ends(Record):
    """How the training rows end."""

    stop_tokens: list[str]
    """Tokens that end an answer."""
    num_ended: int
    """Rows with a stop token at their end that is in the loss."""
    num_not_learned: int
    """Rows with a stop token at their end that is not in the loss."""
    num_cut: int
    """Rows whose stop token is cut off by max_length."""
    num_without: int
    """Rows without a stop token."""


class DataPreview(Record):
    """What `orchestrator data` shows."""

    base: str
    """The base whose tokenizer is used."""
    format: str
    loss_on: str
    max_length: int
    truncate: str
    sources: list[SourceRows]
    num_train: int
    """Training rows, without dropped ones."""
    num_held_out: int
    num_shared: int
    """Held-out rows that are also training rows, token for token."""
    num_tokens: int
    """Tokens in an epoch."""
    num_trained: int
    """Tokens in an epoch that are in the loss."""
    lengths: list[Bin]
    """Lengths of all rows, before the cut."""
    median: int
    longest: int
    cut: list[Place]
    dropped: list[Place]
    """Rows without a token in the loss after the cut."""
    positions: int | None
    """Number of positions that the base was made for, RoPE scaling included; None if it is not known."""
    beyond: list[Place]
    """Rows with more tokens than the base has positions, after the cut."""
    bad: list[BadRows]
    """Rows that the format cannot use and that are left out."""
    unread: dict[str, int]
    """Columns, and keys of turns, that nothing reads -> number of rows that have them."""
    packing: Packing | None
    ends: Ends
    require_stop: bool
    fingerprint: str
    rows: list[ShownRow]


def first_example(data: DataSection, base: BaseSection) -> Example:
    """Return the first row of the held-out rows' source, rendered. No other row is read.

    Raises:
        DataError: the source cannot be read, or the row is not what the section says.
    """
    source = (data.held_out.sources or data.sources)[0].model_copy(update={"max_rows": 1})
    tokenizer = load_tokenizer(base, data.chat_template) if data.has_turns else None
    return render(read_rows(source, data.seed)[0], data, tokenizer)


def preview(data: DataSection, base: BaseSection, num_rows: int, say: Say = lambda _: None) -> DataPreview:
    """Do everything that a sweep would do with its data, but write nothing.

    Args:
        data: the section.
        base: the base whose tokenizer is used.
        num_rows: number of training rows to show, from the first; packed rows in the order of their sequences.
        say: receives messages about progress.

    Raises:
        DataError: a row or a source is not what the section says.
    """
    tokenizer = load_tokenizer(base, data.chat_template)
    return preview_encoded(tokenize(data, tokenizer, say), data, base, num_rows, tokenizer)


def preview_encoded(
    rows: EncodedRows, data: DataSection, base: BaseSection, num_rows: int, tokenizer: Any
) -> DataPreview:
    """Preview rows that are encoded already.

    Args:
        rows: from `tokenize`.
        data, base, num_rows: as in `preview`.
        tokenizer: the one that encoded them.
    """
    every = [*rows.train, *rows.held_out]
    lengths = sorted(len(row.tokens.ids) for row in every)
    kept, positions = rows.kept, load_position_limit(base)
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
        positions=positions,
        beyond=[_place(row) for row in every if row.kept and positions and len(row.kept.ids) > positions],
        bad=rows.bad,
        unread=rows.unread,
        packing=_packing(rows, data.max_length),
        ends=_ends(rows.ends, tokenizer),
        require_stop=data.require_stop,
        fingerprint=fingerprint(rows, data),
        rows=[_shown(row, sequence, tokenizer) for row, sequence in _first(rows, num_rows)],
    )


def pieces(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> list[Piece]:
    """Split tokens into runs that are trained on or not, special or not, each with its text."""
    special = set(tokenizer.all_special_ids)
    found, at, given = [], 0, 0
    for (is_trained, is_special), run in groupby(
        zip(ids, trained, strict=True), key=lambda each: (each[1], each[0] in special)
    ):
        count = len(list(run))
        at += count
        # The text that a run adds to the whole: decoded by itself, it might lose a space.
        whole = str(tokenizer.decode(ids[:at], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if at < len(ids):
            whole = whole.rstrip("\ufffd")  # a character that is not complete yet
        found.append(Piece(text=whole[given:], num_tokens=count, is_trained=is_trained, is_special=is_special))
        given = len(whole)
    return found


def _first(rows: EncodedRows, num_rows: int) -> list[tuple[EncodedRow, int | None]]:
    kept = [row for row in rows.train if row.kept is not None]
    if rows.sequences is None:
        return [(row, None) for row in kept[:num_rows]]
    shown: list[tuple[EncodedRow, int | None]] = []
    for number, sequence in enumerate(rows.sequences):
        shown += [(kept[i], number) for i in sequence]
    return shown[:num_rows]


def _shown(row: EncodedRow, sequence: int | None, tokenizer: Any) -> ShownRow:
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


def _place(row: EncodedRow) -> Place:
    return Place(where=row.where, num_tokens=len(row.tokens.ids))


def _packing(rows: EncodedRows, max_length: int) -> Packing | None:
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
    """Return at most `_MAX_BINS` bins of the same width: 1, 2 or 5 times a power of ten. Empty bins are included."""
    least = lengths[-1] / _MAX_BINS
    power = 10 ** math.floor(math.log10(max(least, 1)))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    first, last = (lengths[0] - 1) // width, (lengths[-1] - 1) // width
    counts = dict.fromkeys(range(first, last + 1), 0)
    for length in lengths:
        counts[(length - 1) // width] += 1
    return [Bin(up_to=(place + 1) * width, num_rows=count) for place, count in counts.items()]
