"""Prepare the data of an experiment: from the data section to token ids, once a sweep, shared by all trials."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from orchestrator.base import load_tokenizer
from orchestrator.data.bad_rows import RowError, bad_rows_error, group_faults
from orchestrator.data.encode import IGNORED, Tokens, encode_all
from orchestrator.data.mix import read_mixed, split_indices
from orchestrator.data.packing import pack_rows
from orchestrator.data.render import Example, render
from orchestrator.data.row import Row
from orchestrator.data.shared_rows import id_types, write_rows
from orchestrator.data.stop_tokens import RowEnds, StopFinder
from orchestrator.data.unread_columns import find_unread
from orchestrator.errors import DataError
from orchestrator.record import BadRows, SourceRows
from orchestrator.record.checked import read_record, write_record
from orchestrator.record.files import building_beside, publish
from orchestrator.record.manifest import folder_fault, seal_folder
from orchestrator.record.models import Record
from orchestrator.spec.sections import BaseSection, DataSection

META = "meta.json"
_MAX_NAMED = 3

_CHUNK_ROWS = 1000
"""Rows in one call of the tokenizer."""

Say = Callable[[str], None]
"""Receives messages about progress."""


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, with the expected answer."""

    ids: list[int]
    answer: str


@dataclass(frozen=True)
class EncodedRow:
    """A row between the tokenizer and the model."""

    where: str
    tokens: Tokens
    """The whole row."""
    kept: Tokens | None
    """The row after the cut; None if it is dropped."""
    num_cut: int
    """Tokens beyond max_length."""
    answer: str


@dataclass(frozen=True)
class EncodedRows:
    """All encoded rows, in three parts, and the sequences into which the training rows are packed."""

    train: list[EncodedRow]
    held_out: list[EncodedRow]
    test: list[EncodedRow]
    sequences: list[list[int]] | None
    """Rows of each sequence, as indices into the kept training rows; None without packing."""
    sources: list[SourceRows]
    ends: RowEnds
    """How the training rows end."""
    bad: list[BadRows]
    """Rows that the format cannot use and that were left out; they are in no part."""
    unread: dict[str, int]
    """Columns, and keys of turns, that nothing reads -> number of rows that have them."""

    @property
    def kept(self) -> list[Tokens]:
        """Training rows that are not dropped."""
        return [row.kept for row in self.train if row.kept is not None]

    @property
    def kept_held_out(self) -> list[Tokens]:
        """Held-out rows that are not dropped."""
        return [row.kept for row in self.held_out if row.kept is not None]

    @property
    def kept_test(self) -> list[Tokens]:
        """Test rows that are not dropped."""
        return [row.kept for row in self.test if row.kept is not None]

    @property
    def num_truncated(self) -> int:
        """Rows in all parts that were too long."""
        return sum(row.num_cut > 0 for row in self._all)

    @property
    def num_dropped(self) -> int:
        """Rows in all parts that have no token in the loss after the cut."""
        return sum(row.kept is None for row in self._all)

    @property
    def num_shared(self) -> int:
        """Held-out rows that are also training rows, token for token; dropped rows do not count."""
        trained = {tuple(row.ids) for row in self.kept}
        return sum(tuple(row.ids) in trained for row in self.kept_held_out)

    @property
    def _all(self) -> list[EncodedRow]:
        return [*self.train, *self.held_out, *self.test]


@dataclass(frozen=True)
class PreparedData:
    """Tokenized rows: two `datasets.Dataset`s with columns input_ids and labels, and the held-out prompts.

    Packed training rows also have a column seq_lengths: the tokens of each row in the sequence.
    """

    train: Any
    held_out: Any
    prompts: list[Prompt]
    fingerprint: str
    """Hash of all ids and labels, of the ends of packed rows, and of a given chat template."""
    num_train: int
    """Training rows, before packing."""
    num_truncated: int
    """Rows that were longer than max_length."""
    num_dropped: int
    """Rows that had no token in the loss after the cut."""
    num_shared: int
    """Held-out rows that are also training rows, token for token."""
    num_sequences: int | None
    """Sequences into which the training rows were packed, or None."""
    sources: list[SourceRows]
    chat_template: str | None
    """Replaces the tokenizer's own template for conversations."""
    stop_tokens: list[int]
    """Ids of the tokens that end an answer."""
    bad_rows: list[BadRows] = field(default_factory=list)
    """Rows that the format cannot use and that were left out."""
    test: Any = None
    """Tokenized rows of data.test, which no decision sees, like `held_out`; None without them."""


class Meta(Record):
    """The content of `meta.json`: all of `PreparedData` but the rows."""

    fingerprint: str
    num_train: int
    num_truncated: int
    num_dropped: int
    num_shared: int
    num_sequences: int | None
    sources: list[SourceRows]
    bad_rows: list[BadRows]
    chat_template: str | None
    stop_tokens: list[int]
    prompts: list[Prompt]


def tokenize(data: DataSection, tokenizer: Any, say: Say = lambda _: None) -> EncodedRows:
    """Read, tokenize, split, cut and pack. The split depends on the data section and its good rows, not on the trial.

    Args:
        data: the section.
        tokenizer: the base's tokenizer.
        say: receives the number of rows that are tokenized.

    Raises:
        DataError: a row or a source is not what the section says.
    """
    say("reading rows")
    mixed = read_mixed(data)
    split_indices(len(mixed.rows), data)  # refuses an impossible number before rows are tokenized
    faults: list[RowError] = []
    read = mixed.rows, mixed.held_out, mixed.test
    own, held_out, test = (_tokenized(rows, data, tokenizer, faults, say) for rows in read)
    if faults and data.bad_rows == "error":
        raise bad_rows_error(faults, sum(map(len, read)))
    for name, before, after in (
        ("training", [1], own),
        ("held-out", mixed.held_out, held_out),
        ("test", mixed.test, test),
    ):
        if before and not after:
            reasons = "; ".join(map(str, group_faults(faults)))
            raise DataError(f"data.bad_rows: drop leaves no {name} row: {reasons}")
    for_held_out, for_test = split_indices(len(own), data)
    apart = for_held_out | for_test
    train = [row for i, row in enumerate(own) if i not in apart]
    held_out += [row for i, row in enumerate(own) if i in for_held_out]
    test += [row for i, row in enumerate(own) if i in for_test]
    if data.truncate == "error":
        _require_short([*train, *held_out, *test], data.max_length)
    for name, part in (("training", train), ("held-out", held_out), *([("test", test)] if data.test else [])):
        if all(row.kept is None for row in part):
            raise DataError(
                f"data.max_length={data.max_length} is too short: after truncation no {name} row has a token in the "
                f"loss. Longest rows: {_lengths(sorted(part, key=lambda row: -len(row.tokens.ids)))}",
                "Raise max_length, or set data.truncate: left, which keeps the ends of rows.",
            )
    kept = [row.kept for row in train if row.kept is not None]
    sequences = pack_rows([len(row.ids) for row in kept], data.max_length) if data.packing else None
    ends = StopFinder(tokenizer).ends_of([row.tokens for row in train], data)
    unread = find_unread([*mixed.rows, *mixed.held_out, *mixed.test], data, tokenizer)
    return EncodedRows(train, held_out, test, sequences, mixed.sources, ends, group_faults(faults), unread)


def prepare(data: DataSection, base: BaseSection) -> PreparedData:
    """Prepare the rows of a sweep.

    Raises:
        DataError: a row or a source is not what the section says, or no row has a stop token (data.require_stop).
    """
    tokenizer = load_tokenizer(base, data.chat_template)
    return prepare_encoded(tokenize(data, tokenizer), data, tokenizer)


def prepare_encoded(rows: EncodedRows, data: DataSection, tokenizer: Any) -> PreparedData:
    """Prepare rows that are encoded already.

    Args:
        rows: from `tokenize`.
        data: the section.
        tokenizer: the one that encoded them.

    Raises:
        DataError: no row has a stop token (data.require_stop).
    """
    finder = StopFinder(tokenizer)
    if data.require_stop:
        rows.ends.require()
    train, held_out = rows.kept, rows.kept_held_out
    types = id_types(1 + max(tokenizer.get_vocab().values()))
    prompts = [
        Prompt(row.tokens.prompt_after_cut(row.kept), finder.without_stop(row.answer))
        for row in rows.held_out
        if row.kept is not None
    ]
    return PreparedData(
        train=_dataset(train, types) if rows.sequences is None else _packed_dataset(train, rows.sequences, types),
        held_out=_dataset(held_out, types),
        prompts=prompts if data.format != "text" else [],
        fingerprint=fingerprint(rows, data),
        num_train=len(train),
        num_truncated=rows.num_truncated,
        num_dropped=rows.num_dropped,
        num_shared=rows.num_shared,
        num_sequences=None if rows.sequences is None else len(rows.sequences),
        sources=rows.sources,
        bad_rows=rows.bad,
        chat_template=data.chat_template,
        stop_tokens=rows.ends.stop_tokens,
        test=_dataset(rows.kept_test, types) if data.test else None,
    )


def fingerprint(rows: EncodedRows, data: DataSection) -> str:
    """Return a hash of everything that trials are trained and evaluated on."""
    digest = hashlib.sha256()
    for part in (rows.kept, rows.kept_held_out):
        for row in part:
            digest.update(json.dumps([row.ids, row.labels]).encode())
        digest.update(b"|")
    for more in (rows.sequences, data.chat_template):
        if more is not None:
            digest.update(json.dumps(more).encode())
    return digest.hexdigest()


def save(prepared: PreparedData, folder: Path, siblings: Path | None = None) -> None:
    """Write prepared data into `folder`, which must not exist; complete or not at all.

    Args:
        prepared: the data.
        folder: the target.
        siblings: a folder of sweeps, whose equal files are linked instead of written; None writes all.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()
    meta = Meta(**{name: getattr(prepared, name) for name in Meta.model_fields})
    with building_beside(folder) as building:
        write_rows(prepared.train, building / "train", siblings)
        write_rows(prepared.held_out, building / "held_out", siblings)
        if prepared.test is not None:
            write_rows(prepared.test, building / "test", siblings)
        write_record(building / META, meta)
        seal_folder(building)
        publish(building, folder)


def load(folder: Path, in_memory: bool = False) -> PreparedData:
    """Read what `save` has written. Rows are read when they are needed, or all at once if `in_memory`.

    Raises:
        DataError: a file is missing or damaged.
    """
    from datasets import load_from_disk

    _require_whole(folder)
    meta = read_record(Meta, folder / META)
    train, held_out = (load_from_disk(folder / part, keep_in_memory=in_memory) for part in ("train", "held_out"))
    return PreparedData(train, held_out, **{name: getattr(meta, name) for name in Meta.model_fields})


def load_test(folder: Path) -> Any:
    """Return the test rows that `save` has written, a `datasets.Dataset`. Trials and workers do not read them.

    Raises:
        DataError: the sweep has none, or they are damaged.
    """
    from datasets import load_from_disk

    _require_whole(folder)
    if not (folder / "test").is_dir():
        raise DataError(f"{folder}: has no test rows", "They are those of data.test, at the start of a sweep.")
    return load_from_disk(folder / "test")


def _require_whole(folder: Path) -> None:
    """Raise DataError if a file is missing or damaged: the rows of a damaged file must not be read."""
    if fault := folder_fault(folder):
        raise DataError(
            f"{folder}: {fault}", f"`orchestrator resume {folder.parent}` makes the rows anew from their sources."
        )


def _tokenized(
    rows: Sequence[Row], data: DataSection, tokenizer: Any, faults: list[RowError], say: Say
) -> list[EncodedRow]:
    """Return the good rows, tokenized and cut; append the faults of bad rows to `faults`.

    If bad rows are an error, rows after the first bad one are checked but not tokenized.
    """
    found: list[EncodedRow] = []
    for start in range(0, len(rows), _CHUNK_ROWS):
        chunk = rows[start : start + _CHUNK_ROWS]
        good: list[tuple[Row, Example]] = []
        for row in chunk:
            try:
                good.append((row, render(row, data, tokenizer)))
            except RowError as error:
                faults.append(error)
        if good and not (faults and data.bad_rows == "error"):
            encoded = encode_all([example for _, example in good], tokenizer, data)
            found += [
                _token_row(row, example, tokens, data) for (row, example), tokens in zip(good, encoded, strict=True)
            ]
        say(f"{start + len(chunk):,} of {len(rows):,} rows tokenized")
    return found


def _token_row(row: Row, example: Example, tokens: Tokens, data: DataSection) -> EncodedRow:
    num_cut = max(0, len(tokens.ids) - data.max_length)
    return EncodedRow(row.where, tokens, tokens.cut(data.max_length, data.truncate), num_cut, example.answer)


def _require_short(rows: Sequence[EncodedRow], max_length: int) -> None:
    long = [row for row in rows if row.num_cut]
    if not long:
        return
    raise DataError(
        f"data.max_length={max_length}: {len(long)} of {len(rows)} rows have more tokens: {_lengths(long)}",
        "Raise max_length, or set data.truncate to right or left: it is error now.",
    )


def _lengths(rows: Sequence[EncodedRow]) -> str:
    """Return the first rows with their numbers of tokens, and how many more there are."""
    named = ", ".join(f"{row.where} ({len(row.tokens.ids)})" for row in rows[:_MAX_NAMED])
    return named + (f" and {len(rows) - _MAX_NAMED} more" if len(rows) > _MAX_NAMED else "")


def _dataset(rows: Sequence[Tokens], types: tuple[str, str]) -> Any:
    return _typed({"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]}, types)


def _packed_dataset(rows: Sequence[Tokens], sequences: Sequence[Sequence[int]], types: tuple[str, str]) -> Any:
    """Join rows into sequences. The first token of each row is not in the loss: its own row does not predict it."""
    parts = [[rows[i] for i in sequence] for sequence in sequences]
    columns = {
        "input_ids": [list(chain.from_iterable(row.ids for row in part)) for part in parts],
        "labels": [list(chain.from_iterable([IGNORED, *row.labels[1:]] for row in part)) for part in parts],
        "seq_lengths": [[len(row.ids) for row in part] for part in parts],
    }
    return _typed(columns, (*types, "int32"))


def _typed(columns: dict[str, list[list[int]]], types: Sequence[str]) -> Any:
    """Return a data set whose columns hold lists of these types of integers."""
    from datasets import Dataset, Features, List, Value

    features = Features({name: List(Value(type_)) for name, type_ in zip(columns, types, strict=True)})
    return Dataset.from_dict(columns, features=features)
