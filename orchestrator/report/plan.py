"""Print what is foreseen of a sweep: sentences first, then tables, within 80 columns."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from orchestrator.data.preview import Bin
from orchestrator.planning.models import CornerPlan, Duration, SweepPlan
from orchestrator.report.data import histogram
from orchestrator.words import counted, say_gib

_GIB = 2**30
_MOST_CORNERS = 8

_SIZE_FIELDS = (
    "base.model",
    "base.quantization",
    "base.double_quant",
    "lora.target_modules",
    "lora.layers_to_transform",
    "training.adapter_dtype",
    "training.dequantize",
    "training.engine",
    "training.optimizer",
    "training.recompute",
)
"""Fields other than rank and rows of a step that change a trial's memory."""

_PARTS = {
    "base": ("base", "dequantized"),
    "LoRA": ("adapters", "gradients"),
    "optim.": ("optimizer",),
    "activ.": ("activations", "transient"),
    "head": ("head",),
}
"""Head of a column -> parts of the prediction in it."""


def say_plan(console: Console, plan: SweepPlan) -> None:
    """Print a plan."""
    for line in [*_sentences(plan), *(f"warning: {each}" for each in plan.warnings), *_notes(plan)]:
        console.print(line, highlight=False, markup=False)
    if plan.corners:
        console.print(_corners_table(plan.corners[:_MOST_CORNERS]))
        if (more := len(plan.corners) - _MOST_CORNERS) > 0:
            console.print(f"and {counted(more, 'smaller corner')}: see --json", highlight=False)
    if plan.whole is not None:
        console.print(_time_table(plan, plan.whole))
    rows = plan.rows
    console.print(f"tokens per row, before the cut: median {rows.median}, longest {rows.longest}", highlight=False)
    for line in histogram([Bin(up_to=up_to, num_rows=number) for up_to, number in rows.lengths], rows.max_length):
        console.print(line, highlight=False, markup=False)


def say_seconds(seconds: float) -> str:
    """Return a time in words, such as `66 s`, `41 min` or `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _sentences(plan: SweepPlan) -> Iterator[str]:
    place = f"on an {plan.device}" if plan.num_gpus == 1 else f"on each of {plan.num_gpus} {plan.device}"
    if not plan.num_gpus:
        place = "in each worker of a CPU"
    head = f"{counted(plan.num_trials, 'trial')}, {plan.slots} in memory at a time {place}"
    if plan.whole is None:
        yield f"{head}. Time: {plan.time_unknown}."
    else:
        yield f"{head}: {_cost(plan, [plan.whole])}."
    if plan.stopped is not None:
        yield f"If {plan.scheduler} stops trials: {_cost(plan, plan.stopped)}."
    yield _memory_sentence(plan)
    rows = plan.rows
    packed = "" if rows.num_sequences is None else f", packed into {counted(rows.num_sequences, 'sequence')}"
    yield (
        f"{counted(rows.num_train, 'training row')}{packed}, {rows.num_held_out} held out; an epoch has "
        f"{rows.tokens_per_epoch:,} tokens. {counted(rows.num_truncated, 'row')} cut to {rows.max_length} tokens, "
        f"{rows.num_dropped} dropped."
    )
    fewest, most = plan.steps
    length = f"{most}" if fewest == most else f"{fewest} to {most}"
    rungs = f", compared at {', '.join(map(str, plan.rungs))}" if plan.rungs else ""
    yield f"A trial has {length} steps{rungs}; search {plan.algorithm}, scheduler {plan.scheduler}."
    if plan.disk is not None:
        disk = plan.disk
        yield (
            f"Disk: {_size(disk.data + disk.adapters)} stay (rows {_size(disk.data)}, best adapters "
            f"{_size(disk.adapters)}); checkpoints of running trials take up to {_size(disk.checkpoints)}."
        )


def _memory_sentence(plan: SweepPlan) -> str:
    known = [corner for corner in plan.corners if corner.total_gib is not None]
    if not known:
        return "Memory: not foreseen" + (": trl." if any(each.engine == "trl" for each in plan.corners) else ".")
    unfit, largest = plan.unfit, max(corner.total_gib or 0.0 for corner in known)
    others = [corner for corner in plan.corners if corner.total_gib is None]
    more = f" Not foreseen (trl): {'; '.join(each.name for each in others[:3])}." if others else ""
    if unfit:
        named = "; ".join(each.name for each in unfit[:3]) + ("; ..." if len(unfit) > 3 else "")
        return f"Memory: {len(unfit)} of {counted(len(known), 'corner')} cannot fit: {named}.{more}"
    return f"Memory: each of {counted(len(known), 'corner')} fits alone; the largest takes {largest:.1f} GiB.{more}"


def _cost(plan: SweepPlan, durations: Sequence[Duration]) -> str:
    """Return time, GPU hours and price, as ranges where there are several durations."""

    def between(words: Sequence[str], unit: str = "") -> str:
        return " to ".join(dict.fromkeys(words)) + unit

    parts = [between([say_seconds(each.total_s) for each in durations])]
    if plan.num_gpus:
        parts.append(between([f"{each.gpu_hours:.2g}" for each in durations], " GPU hours"))
    if durations[0].price is not None:
        parts.append(between([f"{each.price:.2f}" for each in durations], " USD"))
    return ", ".join(parts)


def _notes(plan: SweepPlan) -> Iterator[str]:
    yield from (f"note: {each}" for each in plan.notes)
    for reason in dict.fromkeys(each.reason for each in plan.corners if each.engine == "trl" and each.reason):
        yield f"note: memory and time not foreseen where trl trains: the fast engine does not support {reason}"


def _corners_table(corners: Sequence[CornerPlan]) -> Table:
    """Return a row for each corner: its values, GiB of each part, whether it fits, and the time of a step alone."""
    title = "one trial alone, GiB" if any(corner.memory_gib for corner in corners) else "one trial alone"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("corner", overflow="fold")
    is_foreseen = any(corner.memory_gib for corner in corners)
    names = [*_PARTS, "all", "fits"] if is_foreseen else []
    for name in (*names, "step"):
        table.add_column(name, justify="right", no_wrap=True)
    for corner in corners:
        memory, measured = corner.memory_gib, corner.measured
        parts = [f"{sum(memory[part] for part in parts):.1f}" if memory else "" for parts in _PARTS.values()]
        total = "" if corner.total_gib is None else f"{corner.total_gib:.1f}"
        if measured is not None and measured.peak_gib:
            total = f"{measured.peak_gib:.1f}*"
        step = "" if corner.step_s is None else _milliseconds(corner.step_s)
        if measured is not None:
            step = f"{_milliseconds(measured.step_s)}*"
        fits = {True: "yes", False: "no", None: "?"}[corner.fits]
        table.add_row(_short(corner), *([*parts, total, fits] if is_foreseen else []), step)
    if any(corner.measured for corner in corners):
        table.caption, table.caption_justify = "* measured on this machine", "left"
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


def _short(corner: CornerPlan) -> str:
    """Return what decides the size of a corner: rank, rows of a step, and other searched fields that change it."""
    others = [f"{path.rpartition('.')[2]} {value}" for path, value in corner.values.items() if path in _SIZE_FIELDS]
    return ", ".join([f"rank {corner.rank}", counted(corner.batch_rows, "row"), *others])


def _time_table(plan: SweepPlan, whole: Duration) -> Table:
    """Return the parts of the time, without a stopping rule and with it."""
    columns = {"all trials whole": whole}
    if plan.stopped is not None:
        columns |= dict(zip(("stopped, least", "most"), plan.stopped, strict=True))
    table = Table(title="time", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    durations = list(columns.values())
    parts = [
        ("start", [each.start_s for each in durations]),
        ("training", [each.train_s for each in durations]),
        ("evaluation", [each.evaluate_s for each in durations]),
        ("answers", [each.answer_s for each in durations]),
        ("whole command", [each.total_s for each in durations]),
    ]
    for name, seconds in parts:
        if any(seconds):  # a probe on a CPU knows only the training
            table.add_row(name, *map(say_seconds, seconds))
    table.add_row("tokens", *(f"{each.tokens:,}" for each in durations))
    return table


def _size(number: int) -> str:
    return say_gib(number / _GIB)
