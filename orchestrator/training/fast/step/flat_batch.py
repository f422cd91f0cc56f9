"""A step's tokens, laid end to end: no padding between sequences, and each slot's span a whole number of tiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

IGNORED = -100
"""Target of a token that has no loss."""

TABLE = (
    "key",  # of the dropout masks of this trial and step
    "threshold",  # a token's feature is dropped where its 31 random bits are below
    "keep_scale",  # 1 / (1 - dropout)
    "scale",  # alpha / rank
    "rank",  # of its adapter: kernels leave out what the stack has beyond
    "loss_weight",  # 1 / tokens with a loss in the whole batch
    "applies",  # 1 where the batch ends with this row: the slot's optimizer steps
    "learning_rate",
    "decay",  # weight decay
    "gain1",  # 1 - beta1, and not beta1: 4 bytes hold 0.001 to 8 digits, but 1 - 0.999 only to 4
    "gain2",  # 1 - beta2
    "epsilon",
    "correction1",  # 1 - beta1 ** steps
    "correction2",  # 1 - beta2 ** steps
    "max_norm",  # infinite where nothing is clipped
)
"""What a slot's row of the table says, each in 4 bytes."""

PLACES = ("first_tile", "end_tile")
"""What the layout adds to it: the slot's first tile and the one after its last; alike where it has none."""

INTEGERS = ("key", "threshold", "rank", "applies", *PLACES)


def as_int32(value: int) -> int:
    """The int32 with the lowest 32 bits of this."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


class TokenizedRows:
    """Tokenised rows of one data set, in flat arrays: a batch is a few slices, whatever the rows' lengths.

    A row that is packed has several sequences, which see nothing of each other.
    """

    def __init__(self, input_ids: Sequence[Any], labels: Sequence[Any], parts: Sequence[Any] | None = None) -> None:
        """
        Args:
            input_ids: tokens of each row.
            labels: the same, with -100 where there is no loss.
            parts: lengths of each row's sequences; None where each row is one. Their first tokens have no loss.
        """
        self.lengths = np.array([len(row) for row in input_ids], dtype=np.int64)
        self._parts = None if parts is None else [np.cumsum(row, dtype=np.int64) for row in parts]
        self.most_parts = 1 if parts is None else max(len(row) for row in parts)
        """Sequences of the row that has most."""
        self._ends = np.cumsum(self.lengths)
        self._ids = np.concatenate([np.asarray(row, dtype=np.int32) for row in input_ids])
        targets = np.concatenate([np.asarray(row, dtype=np.int32) for row in labels])
        # A token's target is the next token of its own row.
        self._targets = np.append(targets[1:], np.int32(IGNORED))
        self._targets[self._ends - 1] = IGNORED
        self.num_targets_of_each = np.add.reduceat(self._targets != IGNORED, self._ends - self.lengths, dtype=np.int64)
        """(rows,) tokens with a loss."""

    @classmethod
    def of(cls, dataset: Any) -> "TokenizedRows":
        """From a `datasets.Dataset` with input_ids and labels."""
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
        """(length,) int32 tokens."""
        return self._ids[self._ends[row] - self.lengths[row] : self._ends[row]]

    def targets(self, row: int) -> Any:
        """(length,) int32 next tokens, -100 where there is no loss."""
        return self._targets[self._ends[row] - self.lengths[row] : self._ends[row]]

    def ends(self, row: int) -> Any:
        """(sequences,) where those of a row end within it."""
        return self.lengths[row : row + 1] if self._parts is None else self._parts[row]

    def fitting(self, indices: Sequence[int], max_tokens: int) -> int:
        """How many of these rows, in their order, have at most so many tokens together."""
        return int(np.searchsorted(np.cumsum(self.lengths[list(indices)]), max_tokens, side="right"))

    def num_targets(self, indices: Sequence[int]) -> int:
        """Tokens with a loss in these rows."""
        return int(self.num_targets_of_each[list(indices)].sum())


@dataclass(frozen=True)
class Span:
    """One slot's part of a step."""

    slot: int
    rows: TokenizedRows
    indices: Sequence[int]
    """Rows, in the order of the batch."""
    table: dict[str, float]
    """This slot's values of `TABLE`."""
    first_token: int = 0
    """Tokens of the same batch in earlier rows: dropout counts on."""

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return int(self.rows.lengths[list(self.indices)].sum())

    @property
    def most_sequences(self) -> int:
        """That so many rows can have, and the filler behind them: the same whichever rows they are."""
        return len(self.indices) * self.rows.most_parts + 1


@dataclass(frozen=True)
class FlatBatch:
    """A step's input on the device: views of one buffer, so that one copy brings all of it."""

    ids: torch.Tensor
    """(tokens,) int32."""
    targets: torch.Tensor
    """(tokens,) int32 next tokens; -100 where there is no loss, fillers included."""
    positions: torch.Tensor
    """(tokens,) int32 within the sequence."""
    counters: torch.Tensor
    """(tokens,) int32 within the slot's batch: what dropout counts by."""
    tiles: torch.Tensor
    """(tokens / tile,) int32 slot of each tile."""
    bounds: torch.Tensor
    """(sequences + 1,) int32 ends of the sequences, fillers included; the last ones may be empty."""
    table: dict[str, torch.Tensor]
    """`TABLE` and `PLACES`, each (slots,)."""
    longest: int
    """No sequence is longer."""

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_slots(self) -> int:
        return len(self.table["key"])

    @property
    def tile(self) -> int:
        """Tokens of one tile."""
        return len(self.ids) // len(self.tiles)

    @cached_property
    def owners(self) -> torch.Tensor:
        """(tokens,) slot of each token."""
        return self.tiles.long().repeat_interleave(self.tile)

    @cached_property
    def drops(self) -> bool:
        """Whether any slot has dropout. Reads the table: on a GPU it would wait."""
        return bool(self.table["threshold"].any())

    @cached_property
    def masks(self) -> dict[tuple[int, int], torch.Tensor]:
        """Dropout's masks that `plain` has made: (module, features) -> (tokens, features)."""
        return {}

    @cached_property
    def tokens_of_slots(self) -> list[tuple[int, torch.Tensor]]:
        """Each slot that has tokens, and their places in the row. Reads the tiles: on a GPU it would wait."""
        return [(slot, torch.nonzero(self.owners == slot)[:, 0]) for slot in self.owners.unique().tolist()]

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences side by side: (sequences, longest) tokens' places in the row, and which of them are real.

        The others repeat their own sequence's last token: nothing of another sequence, not even a NaN, is near.
        """
        starts, ends = self.bounds[:-1].long(), self.bounds[1:].long()
        starts, ends = starts[ends > starts], ends[ends > starts]
        places = starts[:, None] + torch.arange(int((ends - starts).max()), device=starts.device)
        return places.minimum(ends[:, None] - 1), places < ends[:, None]


@dataclass(frozen=True)
class BucketShape:
    """Sizes of a bucket: all that a captured graph depends on."""

    num_tokens: int
    num_sequences: int
    num_slots: int
    tile: int
    longest: int

    def buffer(self, device: str | torch.device, pinned: bool = False) -> torch.Tensor:
        """(size,) int32 for one row."""
        return torch.zeros(self._slices[-1].stop, dtype=torch.int32, device=device, pin_memory=pinned)

    def row(self, buffer: torch.Tensor) -> FlatBatch:
        """Views of a buffer."""
        ids, targets, positions, counters, tiles, bounds, table = (buffer[part] for part in self._slices)
        values = table.view(len(TABLE + PLACES), self.num_slots)
        named = {
            name: column if name in INTEGERS else column.view(torch.float32)
            for name, column in zip(TABLE + PLACES, values, strict=True)
        }
        return FlatBatch(ids, targets, positions, counters, tiles, bounds, named, self.longest)

    def fill(self, buffer: Any, spans: Sequence[Span]) -> None:
        """Write a step into a buffer on the host.

        Args:
            buffer: (size,) int32 numpy array.
            spans: at most one a slot. Slots without one keep a table of zeros: their weights do not change.
        """
        ids, targets, positions, counters, tiles, bounds, table = (buffer[part] for part in self._slices)
        ids.fill(0)
        targets.fill(IGNORED)
        counters.fill(0)
        tiles.fill(0)
        table.fill(0)
        table = table.reshape(len(TABLE + PLACES), self.num_slots)
        at, ends = 0, [0]
        for span in spans:
            counter, first_tile = span.first_token, at // self.tile
            for index in span.indices:
                end = at + int(span.rows.lengths[index])
                ids[at:end] = span.rows.ids(index)
                targets[at:end] = span.rows.targets(index)
                counters[at:end] = np.arange(counter, counter + end - at, dtype=np.int32)
                counter += end - at
                ends.extend((at + span.rows.ends(index)).tolist())
                at = end
            if at % self.tile:
                at += self.tile - at % self.tile
                ends.append(at)
            tiles[first_tile : at // self.tile] = span.slot
            values = span.table | dict(zip(PLACES, (first_tile, at // self.tile), strict=True))
            for column, name in zip(table, TABLE + PLACES, strict=True):
                value = np.int32(values[name]) if name in INTEGERS else np.float32(values[name]).view(np.int32)
                column[span.slot] = value
        while ends[-1] < self.num_tokens:  # the rest of the bucket, in sequences that are not too long
            ends.append(min(ends[-1] + self.longest, self.num_tokens))
        bounds.fill(self.num_tokens)
        bounds[: len(ends)] = ends
        starts = np.repeat(ends[:-1], np.diff(ends))
        positions[:] = np.arange(self.num_tokens) - starts

    @cached_property
    def _slices(self) -> list[slice]:
        tokens = self.num_tokens
        sizes = [tokens] * 4 + [tokens // self.tile, self.num_sequences + 1, len(TABLE + PLACES) * self.num_slots]
        slices, at = [], 0
        for size in sizes:
            slices.append(slice(at, at + size))
            at += size + -size % 4  # 16 bytes: what kernels like to read
        return slices
