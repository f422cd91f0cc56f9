"""Print rows as the model sees them: which tokens are in the loss, and which rows are truncated or dropped."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from orchestrator.data.long_rows import NOT_READ, REMEDY, describe_long_rows
from orchestrator.data.preview import Bin, DataPreview, Place, ShownRow
from orchestrator.words import counted

_MOST_NAMED = 5
_BAR = 40
_OPEN, _CLOSE = "⟦", "⟧"
"""Marks around the tokens in the loss, for output without colors."""


def say_data(console: Console, shown: DataPreview) -> None:
    """Print example rows, the lengths of all rows, and which rows are truncated or dropped."""
    is_colored = console.color_system is not None and not console.no_color
    for row in shown.rows:
        console.print(_head(row), style="bold", soft_wrap=True, highlight=False)
        console.print(row_text(row, is_colored), soft_wrap=True, highlight=False)
        console.print()
    mark = "green" if is_colored else f"{_OPEN} {_CLOSE}"
    lines = [
        f"format {shown.format}, tokenizer of base {shown.base}",
        f"in the loss ({shown.loss_on}): tokens marked {mark}; the others are context only",
        *_source_lines(shown),
        f"{counted(shown.num_train, 'training row')}, {shown.num_held_out} held out; an epoch has "
        f"{shown.num_tokens:,} tokens, {shown.num_trained:,} of them in the loss",
    ]
    if shown.packing is not None:
        packing = shown.packing
        lines.append(
            f"packed into {counted(packing.num_sequences, 'sequence')}, {packing.filled:.1%} full, with up to "
            f"{counted(packing.most_rows, 'row')} in one; rows do not attend to each other"
        )
    lines.append(f"tokens per row: median {shown.median}, longest {shown.longest}, max_length {shown.max_length}")
    lines += histogram(shown.lengths, shown.max_length)
    lines += _named(shown.cut, f"truncated ({shown.truncate})")
    lines += _named(shown.dropped, "dropped, because no token in the loss is left")
    lines += _beyond(shown)
    lines += _end_lines(shown)
    lines += _bad(shown)
    if shown.unread:
        named = ", ".join(f"{name} ({counted(number, 'row')})" for name, number in shown.unread.items())
        lines.append(f"columns that neither the format nor a template uses: {named}")
    if shown.num_shared:
        shared = counted(shown.num_shared, "held-out row is", "held-out rows are")
        lines.append(f"{shared} also in the training data; that loss says little about new data")
    lines.append(f"fingerprint {shown.fingerprint}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def row_text(row: ShownRow, is_colored: bool) -> Text:
    """Return a row as text, with the tokens in the loss colored, or between marks if there are no colors.

    With colors, special tokens are reversed and tokens outside the loss are dim.
    """
    text, is_open = Text(), False
    for piece in row.pieces:
        if not is_colored and piece.is_trained != is_open:
            text.append(_OPEN if piece.is_trained else _CLOSE)
            is_open = piece.is_trained
        style = ("green" if piece.is_trained else "dim") if is_colored else ""
        text.append(piece.text, f"{style} reverse".strip() if is_colored and piece.is_special else style)
    if is_open:
        text.append(_CLOSE)
    return text


def histogram(bins: Sequence[Bin], max_length: int) -> list[str]:
    """Return a bar for each bin, and a line above the first bin whose rows are longer than `max_length`."""
    most, width = max(each.num_rows for each in bins), len(str(bins[-1].up_to))
    lines, is_past = [], False
    for each in bins:
        if each.up_to > max_length and not is_past:
            is_past = True
            lines.append(f"  ----- max_length {max_length} -----")
        bar = "#" * -(-_BAR * each.num_rows // most)
        lines.append(f"  up to {each.up_to:>{width}} {bar} {each.num_rows}")
    return lines


def _head(row: ShownRow) -> Text:
    packed = f"sequence {row.sequence}: " if row.sequence is not None else ""
    cut = f", {row.num_cut} truncated" if row.num_cut else ""
    return Text(f"{packed}{row.where}: {row.num_tokens} tokens, {row.num_trained} in the loss{cut}")


def _source_lines(shown: DataPreview) -> list[str]:
    if len(shown.sources) == 1:
        return []
    return [
        f"{source.num_taken} of {source.num_read} rows from {source.source}"
        + (f", weight {source.weight:g}" if source.weight is not None else "")
        for source in shown.sources
    ]


def _end_lines(shown: DataPreview) -> list[str]:
    """Return which tokens end an answer, and which training rows do not teach the model to stop."""
    ends = shown.ends
    lines = [f"stop tokens: {', '.join(ends.stop_tokens) or 'none'}"]
    if not ends.num_ended and not ends.num_cut:
        lines.append("no row ends with a stop token" + (" that is in the loss" if ends.num_not_learned else ""))
    for count, what in (
        (ends.num_without, "without a stop token"),
        (ends.num_not_learned, "with a stop token that is not in the loss"),
        (ends.num_cut, "truncated before their stop token"),
    ):
        if count:
            lines.append(f"{counted(count, 'training row ends', 'training rows end')} {what}")
    if shown.require_stop and not ends.num_ended and not ends.num_cut:
        lines.append("training refuses such rows unless data.require_stop is false")
    return lines


def _beyond(shown: DataPreview) -> list[str]:
    """Return a warning about rows that are longer than the base has positions."""
    if not shown.beyond or shown.positions is None:
        return []
    num_rows, longest = shown.num_train + shown.num_held_out, max(place.num_tokens for place in shown.beyond)
    sentence = describe_long_rows(
        len(shown.beyond), num_rows, min(longest, shown.max_length), shown.positions, shown.base
    )
    lines = [f"warning: {sentence}; it was not trained on such rows. {NOT_READ}. {REMEDY}"]
    return lines + _named(shown.beyond, "beyond the positions of the base")


def _bad(shown: DataPreview) -> list[str]:
    if not shown.bad:
        return []
    number = sum(bad.num_rows for bad in shown.bad)
    return [
        f"{counted(number, 'row is', 'rows are')} left out (data.bad_rows: drop):",
        *(f"  {bad}" for bad in shown.bad),
    ]


def _named(places: Sequence[Place], what: str) -> list[str]:
    if not places:
        return []
    named = ", ".join(f"{place.where} ({place.num_tokens} tokens)" for place in places[:_MOST_NAMED])
    more = f" and {len(places) - _MOST_NAMED} more" if len(places) > _MOST_NAMED else ""
    return [f"{counted(len(places), 'row is', 'rows are')} {what}: {named}{more}"]
