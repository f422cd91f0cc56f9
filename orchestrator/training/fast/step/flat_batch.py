"""The input of a step: the tokens of all slots end to end, in one buffer.

Sequences follow each other without padding. Only the end of a slot's span is padded, to whole tiles, and the end of the
flat batch, to the size of its bucket:

    token      0  1  2  3 | 4  5  6  7 | 8  9 10 11 |12 13 14 15 |16 17 18 19
    sequence   a  a  b  b | b  -  -  - | c  c  c  c | -  -  -  - | -  -  -  -
    tile         slot 2   |   slot 2   |   slot 0   |  padding of the bucket
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

IGNORED = -100
"""Target of a token that has no loss."""

TABLE = (
    "key",  # of this trial's and this step's dropout masks
    "threshold",  # a feature of a token is dropped where its 31 random bits are below this
    "keep_scale",  # 1 / (1 - dropout)
    "scale",  # alpha / rank; a layer's own is this times `Adapters.factors`
    "rank",  # largest of the slot's layers: kernels leave out what the stack has beyond it
    "loss_weight",  # 1 / number of tokens with a loss in the whole batch
    "applies",  # 1 where the batch ends with this pass: the slot's optimizer steps
    "learning_rate",
    "weight_decay",
    "one_minus_beta1",  # and not beta1: float32 holds 0.001 to 8 digits, but 1 - 0.999 to 4 only
    "one_minus_beta2",
    "epsilon",
    "bias_correction1",  # 1 - beta1 ** steps
    "bias_correction2",  # 1 - beta2 ** steps
    "max_norm",  # of the gradient; infinite where nothing is clipped
)
"""Fields that a trial gives for its slot, 4 bytes each."""

WITHOUT_DROPOUT = {"threshold": 0, "keep_scale": 1.0, "applies": 0, "loss_weight": 1.0}
"""Values of `TABLE` for a pass that trains nothing."""

TILE_RANGE = ("first_tile", "end_tile")
"""Fields that `BucketShape.fill` adds: the slot's first tile, and the tile after its last; 0 and 0 without tokens."""

INTEGERS = ("key", "threshold", "rank", "applies", *TILE_RANGE)
"""Fields that are int32; the others are float32."""


def as_int32(value: int) -> int:
    """Return the int32 that has the lowest 32 bits of a value."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


class TokenizedRows:
    """The tokenized rows of a data set in flat arrays, so that a batch is a few slices whatever the lengths.

    A packed row holds several sequences, which do not attend to each other.
    """

    def __init__(
        self, input_ids: Sequence[Any], labels: Sequence[Any], sequence_lengths: Sequence[Any] | None = None
    ) -> None:
        """Lay the rows end to end.

        Args:
            input_ids: tokens of each row.
            labels: the same tokens, with -100 where a token has no loss.
            sequence_lengths: lengths of the sequences in each row; None where each row is one sequence. The labels of
                their first tokens must be -100.
        """
        self.lengths = np.array([len(row) for row in input_ids], dtype=np.int64)
        self._sequence_ends = (
            None if sequence_lengths is None else [np.cumsum(row, dtype=np.int64) for row in sequence_lengths]
        )
        self.max_sequences = 1 if sequence_lengths is None else max(len(row) for row in sequence_lengths)
        """Largest number of sequences in a row."""
        self._ends = np.cumsum(self.lengths)
        self._ids = np.concatenate([np.asarray(row, dtype=np.int32) for row in input_ids])
        targets = np.concatenate([np.asarray(row, dtype=np.int32) for row in labels])
        # The target of a token is the next token of its own row.
        self._targets = np.append(targets[1:], np.int32(IGNORED))
        self._targets[self._ends - 1] = IGNORED
        self.num_targets_per_row = np.add.reduceat(self._targets != IGNORED, self._ends - self.lengths, dtype=np.int64)
        """(rows,) number of tokens with a loss."""

    @classmethod
    def of(cls, dataset: Any) -> "TokenizedRows":
        """Read a `datasets.Dataset` with the columns input_ids, labels and, where rows are packed, seq_lengths."""
        table = dataset.with_format("arrow")[:]

        def split(name: str) -> list[Any]:
            column = table.column(name).combine_chunks()
            ends = np.cumsum(column.value_lengths().to_numpy())[:-1]
            return np.split(column.flatten().to_numpy(), ends)

        return cls(*(split(name) for name in ("input_ids", "labels", "seq_lengths") if name in table.column_names))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    def ids(self, row: int) -> Any:
        """Return the (length,) int32 tokens of a row."""
        return self._ids[self._ends[row] - self.lengths[row] : self._ends[row]]

    def targets(self, row: int) -> Any:
        """Return the (length,) int32 next tokens of a row, -100 where there is no loss."""
        return self._targets[self._ends[row] - self.lengths[row] : self._ends[row]]

    def sequence_ends(self, row: int) -> Any:
        """Return (sequences,) the ends of a row's sequences, counted from the start of the row."""
        return self.lengths[row : row + 1] if self._sequence_ends is None else self._sequence_ends[row]

    def fitting(self, indices: Sequence[int], max_tokens: int) -> int:
        """Count how many of these rows, taken in order, have at most `max_tokens` tokens together."""
        return int(np.searchsorted(np.cumsum(self.lengths[list(indices)]), max_tokens, side="right"))

    def num_targets(self, indices: Sequence[int]) -> int:
        """Count the tokens with a loss in these rows."""
        return int(self.num_targets_per_row[list(indices)].sum())


@dataclass(frozen=True)
class Span:
    """The part of a flat batch that belongs to one slot."""

    slot: int
    rows: TokenizedRows
    indices: Sequence[int]
    """Rows of the data set, in the order of the batch."""
    table: dict[str, float]
    """The slot's values of `TABLE`."""
    first_token: int = 0
    """Tokens of the same batch in earlier passes. Dropout positions count on from here."""

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.rows.lengths[list(self.indices)].sum())

    @property
    def num_targets(self) -> int:
        """Tokens with a loss."""
        return self.rows.num_targets(self.indices)

    @property
    def max_sequences(self) -> int:
        """Upper bound of sequences, padding included. It depends on the number of rows, not on which rows they are."""
        return len(self.indices) * self.rows.max_sequences + 1


def split_into_passes(spans: Sequence[Span], max_tokens: int, whole_tiles: Callable[[int], int]) -> list[list[Span]]:
    """Cut spans into parts of whole rows that fill passes one after another, in their order.

    Args:
        spans: at most one for each slot.
        max_tokens: tokens of a pass. A row that is longer has a pass of its own.
        whole_tiles: rounds the tokens of a span up to whole tiles.
    """
    passes: list[list[Span]] = [[]]
    left = max_tokens
    for span in spans:
        at = 0
        while at < len(span.indices):
            fits = span.rows.fitting(span.indices[at:], left)
            if not fits and passes[-1]:
                passes.append([])
                left = max_tokens
                continue
            part = replace(span, indices=span.indices[at : at + max(fits, 1)])
            passes[-1].append(part)
            left -= whole_tiles(part.num_tokens)
            at += len(part.indices)
    return passes


@dataclass(frozen=True)
class FlatBatch:
    """The input of a step on the device: views of one buffer, so that one copy brings all of it.

    Padding forms sequences of its own.
    """

    ids: torch.Tensor
    """(T,) int32 tokens."""
    targets: torch.Tensor
    """(T,) int32 next tokens; -100 where there is no loss, padding included."""
    target_tokens: torch.Tensor
    """(max_targets,) int32 indices of the tokens with a loss, in ascending order, and then T to fill up."""
    positions: torch.Tensor
    """(T,) int32 position within the sequence."""
    dropout_positions: torch.Tensor
    """(T,) int32 position within the slot's batch, from which its dropout mask is computed."""
    tile_slots: torch.Tensor
    """(T / tile,) int32 slot of each tile."""
    cu_seqlens: torch.Tensor
    """(sequences + 1,) int32 cumulative lengths of the sequences, padding included; the last ones may be empty."""
    table: dict[str, torch.Tensor]
    """Each field of `TABLE` and `TILE_RANGE` for all slots, (S,)."""
    max_seqlen: int
    """Upper bound of a sequence's length in tokens."""

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return len(self.ids)

    @property
    def num_slots(self) -> int:
        return len(self.table["key"])

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return len(self.ids) // len(self.tile_slots)

    @cached_property
    def slot_ids(self) -> torch.Tensor:
        """(T,) int64 slot of each token."""
        return self.tile_slots.long().repeat_interleave(self.tile)

    @cached_property
    def has_dropout(self) -> bool:
        """True where any slot has dropout. Reads the table: on a GPU this waits for the device."""
        return bool(self.table["threshold"].any())

    @cached_property
    def dropout_masks(self) -> dict[tuple[int, int], torch.Tensor]:
        """Masks that `reference` has computed, which its backward needs again: (module, features) -> (T, features)."""
        return {}

    @cached_property
    def tokens_by_slot(self) -> list[tuple[int, torch.Tensor]]:
        """Each slot that has tokens, and their indices. Reads the slots: on a GPU this waits for the device."""
        return [(slot, torch.nonzero(self.slot_ids == slot)[:, 0]) for slot in self.slot_ids.unique().tolist()]

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sequences as a rectangle: (sequences, longest) token indices, and a bool mask of the real ones.

        The other entries repeat the last token of their own sequence. Values of another sequence, NaN included, thus
        never come near.
        """
        starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        starts, ends = starts[ends > starts], ends[ends > starts]
        indices = starts[:, None] + torch.arange(int((ends - starts).max()), device=starts.device)
        return indices.minimum(ends[:, None] - 1), indices < ends[:, None]


@dataclass(frozen=True)
class BucketShape:
    """The sizes of a bucket: all that a captured graph depends on."""

    num_tokens: int
    max_targets: int
    """Upper bound of the tokens with a loss."""
    num_sequences: int
    num_slots: int
    tile: int
    max_seqlen: int

    def buffer(self, device: str | torch.device, pinned: bool = False) -> torch.Tensor:
        """Allocate the (size,) int32 buffer of one flat batch, filled with zeros."""
        return torch.zeros(self._slices[-1].stop, dtype=torch.int32, device=device, pin_memory=pinned)

    def view(self, buffer: torch.Tensor) -> FlatBatch:
        """View a buffer as a flat batch."""
        ids, targets, positions, dropout_positions, target_tokens, tile_slots, cu_seqlens, table = (
            buffer[part] for part in self._slices
        )
        values = table.view(len(TABLE + TILE_RANGE), self.num_slots)
        named = {
            name: column if name in INTEGERS else column.view(torch.float32)
            for name, column in zip(TABLE + TILE_RANGE, values, strict=True)
        }
        return FlatBatch(
            ids, targets, target_tokens, positions, dropout_positions, tile_slots, cu_seqlens, named, self.max_seqlen
        )

    def fill(self, buffer: Any, spans: Sequence[Span]) -> None:
        """Write the input of a step into a buffer on the host.

        Args:
            buffer: (size,) int32 NumPy array.
            spans: at most one for each slot. Slots without a span keep a table of zeros: their weights do not change.
        """
        ids, targets, positions, dropout_positions, target_tokens, tile_slots, cu_seqlens, table = (
            buffer[part] for part in self._slices
        )
        ids.fill(0)
        targets.fill(IGNORED)
        dropout_positions.fill(0)
        tile_slots.fill(0)
        table.fill(0)
        table = table.reshape(len(TABLE + TILE_RANGE), self.num_slots)
        at, ends = 0, [0]
        for span in spans:
            position, first_tile = span.first_token, at // self.tile
            for index in span.indices:
                end = at + int(span.rows.lengths[index])
                ids[at:end] = span.rows.ids(index)
                targets[at:end] = span.rows.targets(index)
                dropout_positions[at:end] = np.arange(position, position + end - at, dtype=np.int32)
                position += end - at
                ends.extend((at + span.rows.sequence_ends(index)).tolist())
                at = end
            if at % self.tile:
                at += self.tile - at % self.tile
                ends.append(at)
            tile_slots[first_tile : at // self.tile] = span.slot
            values = span.table | dict(zip(TILE_RANGE, (first_tile, at // self.tile), strict=True))
            for column, name in zip(table, TABLE + TILE_RANGE, strict=True):
                value = np.int32(values[name]) if name in INTEGERS else np.float32(values[name]).view(np.int32)
                column[span.slot] = value
        with_loss = np.flatnonzero(targets != IGNORED)
        target_tokens.fill(self.num_tokens)
        target_tokens[: len(with_loss)] = with_loss
        while ends[-1] < self.num_tokens:  # the rest of the bucket, in sequences of at most `max_seqlen`
            ends.append(min(ends[-1] + self.max_seqlen, self.num_tokens))
        cu_seqlens.fill(self.num_tokens)
        cu_seqlens[: len(ends)] = ends
        starts = np.repeat(ends[:-1], np.diff(ends))
        positions[:] = np.arange(self.num_tokens) - starts

    @cached_property
    def _slices(self) -> list[slice]:
        """Slice of the buffer for each field, in int32 elements."""
        tokens = self.num_tokens
        table = len(TABLE + TILE_RANGE) * self.num_slots
        sizes = [tokens] * 4 + [self.max_targets, tokens // self.tile, self.num_sequences + 1, table]
        slices, at = [], 0
        for size in sizes:
            slices.append(slice(at, at + size))
            at += size + -size % 4  # fields begin at multiples of 16 bytes, which kernels read fastest
        return slices
