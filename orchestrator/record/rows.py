"""Describe what became of a sweep's rows: which were left out, truncated, or are shared with training."""

from orchestrator.record.models import SweepInfo


def notes_on_rows(info: SweepInfo) -> list[str]:
    """Return lines on how many rows each source gave, and how many were left out, truncated or shared."""
    most = info.spec.data.max_length
    lines = []
    for source in info.sources if len(info.sources) > 1 else []:
        weight = f", weight {source.weight:g}" if source.weight is not None else ""
        lines.append(f"rows: {source.num_taken} of {source.num_read} from {source.source}{weight}")
    num_bad = sum(bad.num_rows for bad in info.bad_rows)
    used, cut = info.num_train + info.num_held_out + info.num_test, info.spec.data.truncate
    read = used + info.num_dropped
    if num_bad:
        lines.append(f"note: {num_bad} of {read + num_bad} rows do not fit data.format and were left out")
    lines += [f"  {bad}" for bad in info.bad_rows]
    notes = [
        (info.num_truncated, read, f"rows were truncated to data.max_length={most} tokens ({cut})"),
        (info.num_dropped, read, "rows had no token in the loss after truncation and were left out"),
        (
            info.num_shared,
            info.num_held_out,
            "held-out rows are also training rows; their loss says little about new data",
        ),
    ]
    return lines + [f"note: {number} of {total} {what}" for number, total, what in notes if number]
