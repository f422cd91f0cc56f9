"""Describe what became of a sweep's rows: which were left out, truncated, or are shared with training."""

from orchestrator.record.models import SweepInfo


def notes_on_rows(info: SweepInfo) -> list[str]:
    """Return lines on how many rows each source gave, and how many were left out, truncated or shared."""
    lines = []
    for source in info.sources if len(info.sources) > 1 else []:
        weight = f", weight {source.weight:g}" if source.weight is not None else ""
        lines.append(f"rows: {source.num_taken} of {source.num_read} from {source.source}{weight}")
    misfits, *others = doubtful_rows(info)
    lines += [f"note: {misfits}"] if misfits else []
    lines += [f"  {bad}" for bad in info.bad_rows]
    return lines + [f"note: {other}" for other in others if other]


def doubtful_rows(info: SweepInfo) -> list[str]:
    """Return how many rows do not fit the format, were truncated, were left out, and are shared; "" where none is."""
    most, cut = info.spec.data.max_length, info.spec.data.truncate
    num_bad = sum(bad.num_rows for bad in info.bad_rows)
    read = info.num_train + info.num_held_out + info.num_test + info.num_dropped
    counts = [
        (num_bad, read + num_bad, "rows do not fit data.format and were left out"),
        (info.num_truncated, read, f"rows were truncated to data.max_length={most} tokens ({cut})"),
        (info.num_dropped, read, "rows had no token in the loss after truncation and were left out"),
        (
            info.num_shared,
            info.num_held_out,
            "held-out rows are also training rows; their loss says little about new data",
        ),
    ]
    return [f"{number} of {total} {what}" if number else "" for number, total, what in counts]
