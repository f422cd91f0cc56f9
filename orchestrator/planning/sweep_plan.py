"""Foresees a whole sweep: `plan_sweep`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.base import load_tokenizer
from orchestrator.data.long_rows import note_on_max_length
from orchestrator.data.prepare import PreparedData, prepare_encoded, tokenize
from orchestrator.data.preview import DataPreview, preview_encoded
from orchestrator.planning.answers import AnswerSize, num_rounds
from orchestrator.planning.corners import Outlook, Pack, empty_outlook, plan_corners, together_reason
from orchestrator.planning.disk import plan_disk
from orchestrator.planning.doubts import doubts_of
from orchestrator.planning.gpus import GIB, Gpu
from orchestrator.planning.makespan import (
    END_S,
    TrialSize,
    shortened,
    start_seconds,
    total_tokens,
    train_makespan,
)
from orchestrator.planning.models import CornerPlan, Duration, RowsPlan, SweepPlan
from orchestrator.planning.saved_tokens import shares_of, trained_shares
from orchestrator.planning.trials import drawn_trials, rungs_of
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.sections import BaseSection
from orchestrator.training.engines.check_targets import EmptyBases, check_targets
from orchestrator.training.fast.plan.memory_plan import CPU_FULL
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.worker.spread import max_concurrent_trials, spread
from orchestrator.words import counted

_HOUR = 3600

_ALL_CUT = 0.5
"""Share of truncated rows from which on a plan warns."""


def plan_sweep(
    spec: SweepSpec,
    name: str,
    gpu: Gpu | None,
    num_gpus: int = 1,
    *,
    budget: int | None = None,
    price: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> SweepPlan:
    """Foresee a sweep. The rows are tokenized; weights of the base are not loaded, and nothing is trained or written.

    Args:
        spec: the experiment; the base section as the base's files hold it (`base_folder.as_stored`).
        name: the experiment's name, for the plan.
        gpu: the kind of GPU; None plans for CPUs, where memory and time are not foreseen.
        num_gpus: number of GPUs.
        budget: bytes of memory that trials may use on a GPU; None derives it from the kind of GPU.
        price: of a GPU hour.
        say: receives messages about progress.

    Raises:
        RequestError: base, targets or rows do not match the experiment.
    """
    empty = EmptyBases()
    check_targets(spec, empty)
    tokenizer = load_tokenizer(spec.base, spec.data.chat_template)
    encoded = tokenize(spec.data, tokenizer, say)
    shown = preview_encoded(encoded, spec.data, spec.base, 0, tokenizer)
    data = prepare_encoded(encoded, spec.data, tokenizer)
    rows = TokenizedRows.of(data.train), TokenizedRows.of(data.held_out)
    trials = drawn_trials(spec)
    steps = sorted(config.training.steps_of(len(rows[0])) for config in trials)
    outlooks = {}
    for base in dict.fromkeys(config.base for config in (*spec.samples(), *trials)):
        outlook = None if gpu is None else empty_outlook(base, empty, gpu, rows, budget, spec.num_shards)
        if outlook is not None:
            outlooks[base] = outlook
    num_dropped = _num_dropped(spec, trials, outlooks)
    sizes = [TrialSize.of(config, *rows) for config in trials]
    shared = _Shared.of(spec, trials, sizes, outlooks.get(spec.base), num_gpus)
    answers = AnswerSize.of(spec, [len(prompt.ids) for prompt in data.prompts])
    whole, stopped = _durations(spec, sizes, shared, price, answers)
    model = empty.of(spec.base)
    num_tokens = shown.num_tokens + int(rows[1].lengths.sum())
    running = min(len(trials), shared.slots * num_gpus)
    return SweepPlan(
        name=name,
        base=spec.base.model,
        device="a CPU" if gpu is None else gpu.title,
        num_gpus=0 if gpu is None else num_gpus,
        is_scaled=gpu is not None and not gpu.is_measured,
        num_trials=len(trials),
        algorithm=spec.search.algorithm,
        scheduler=spec.scheduler.kind,
        steps=[steps[0], steps[-1]],
        tokens=total_tokens(sizes),
        rungs=rungs_of(spec, steps[-1]),
        slots=shared.slots,
        slots_why=shared.slots_why,
        rows=_rows_plan(shown, data),
        corners=plan_corners(spec, outlooks),
        whole=whole,
        stopped=stopped,
        time_unknown=shared.unknown,
        disk=None if model is None else plan_disk(model, trials, running, num_tokens),
        warnings=[*doubts_of(spec), *_doubts_of_rows(spec, shown, data)],
        notes=[
            *_notes(spec, gpu),
            *_note_on_answers(answers, shared),
            *_note_on_dropped(spec, num_dropped, len(trials)),
        ],
        num_dropped=num_dropped,
    )


@dataclass(frozen=True)
class _Shared:
    """How the sweep's trials share the GPUs."""

    slots: int
    slots_why: str
    num_gpus: int
    unknown: str | None
    """Why times are not foreseen, or None."""
    outlook: Outlook | None = None
    pack: Pack | None = None

    @classmethod
    def of(
        cls,
        spec: SweepSpec,
        trials: Sequence[TrialConfig],
        sizes: Sequence[TrialSize],
        outlook: Outlook | None,
        num_gpus: int,
    ) -> "_Shared":
        """Choose the trials at a time on each GPU, by the rules of `workers.fleet` and `memory_plan.plan_slots`."""
        requested = spec.resources.trials_per_gpu
        _, wanted = spread(max_concurrent_trials(spec), requested, num_gpus)
        if outlook is None:
            # As `memory_plan.plan_slots` for a CPU, with mean batches.
            slots = min(wanted, max(1, round(CPU_FULL / max(1.0, sizes[0].tokens))))
            why = f"{CPU_FULL} tokens keep a core busy"
            return cls(slots, why, num_gpus, "times on a CPU are not foreseen; give --gpu or --probe")
        supported = [config for config in spec.corners_on_base() if together_reason(config, spec, outlook) is None]
        if not supported:
            return cls(1, "trl trains one at a time", num_gpus, "times of trl are not foreseen; --probe measures steps")
        slots, why = wanted, f"resources.trials_per_gpu is {requested}"
        if requested == "auto" and wanted > 1:
            slots, why = outlook.slots(supported, wanted)
        elif requested == "auto":
            why = "there are no more trials at a time than GPUs"
        if spec.num_shards > 1:
            return cls(slots, why, num_gpus, "times of trials on a base in pieces are not foreseen")
        if spec.resources.gpus_per_trial not in ("auto", 1):
            several = f"times of trials on {spec.resources.gpus_per_trial} GPUs are not foreseen"
            return cls(1, "resources.gpus_per_trial", num_gpus, several)
        reasons = [reason for each in trials if (reason := together_reason(each, spec, outlook)) is not None]
        pack = outlook.pack(supported, slots)
        unknown: str | None = None
        if reasons:
            unknown = f"{len(reasons)} of {counted(len(trials), 'trial')} cannot be foreseen: {reasons[0]}"
        elif pack is None:
            unknown = f"{counted(slots, 'trial')} at a time do not fit into memory"
        return cls(slots, why, num_gpus, unknown, outlook, pack)


def _durations(
    spec: SweepSpec, sizes: Sequence[TrialSize], shared: _Shared, price: float | None, answers: AnswerSize | None
) -> tuple[Duration | None, list[Duration] | None]:
    """Return the duration without a stopping rule, and the shortest and longest with it."""
    if shared.unknown is not None or shared.pack is None or shared.outlook is None:
        return None, None
    whole = _duration(sizes, shared, price, answers, len(sizes))
    shares = shares_of(spec)
    if shares is None:
        return whole, None
    found = []
    for share in shares:
        trained = trained_shares(len(sizes), share)
        found.append(_duration(shortened(sizes, trained), shared, price, answers, trained.count(1.0)))
    return whole, found


def _duration(
    sizes: Sequence[TrialSize], shared: _Shared, price: float | None, answers: AnswerSize | None, num_whole: int
) -> Duration:
    """Foresee the time of trials of these sizes, of which `num_whole` run to their end."""
    assert shared.pack is not None
    assert shared.outlook is not None
    shape, num_gpus = shared.pack.shape, shared.num_gpus
    train_s, evaluate_s = train_makespan(sizes, shared.pack.times, shared.outlook.gpu, num_gpus, shared.slots)
    heads = (1 if shape.tied else 2) * shape.vocabulary * shape.hidden
    start_s = start_seconds(2 * (shape.num_linear_weights + heads), min(shared.slots, len(sizes)))
    answer_s = 0.0
    if answers is not None:
        slots = min(shared.slots, len(sizes))
        a_round = answers.seconds(shared.pack.times, shared.outlook.gpu, slots) / slots
        answer_s = num_rounds(answers, sizes, num_whole) * a_round / num_gpus
    total_s = start_s + train_s + evaluate_s + answer_s + END_S
    gpu_hours = num_gpus * total_s / _HOUR
    return Duration(
        tokens=total_tokens(sizes),
        start_s=round(start_s, 1),
        train_s=round(train_s, 1),
        evaluate_s=round(evaluate_s, 1),
        answer_s=round(answer_s, 1),
        total_s=round(total_s, 1),
        gpu_hours=round(gpu_hours, 4),
        price=None if price is None else round(price * gpu_hours, 2),
    )


def _rows_plan(shown: DataPreview, data: PreparedData) -> RowsPlan:
    return RowsPlan(
        num_train=shown.num_train,
        num_held_out=shown.num_held_out,
        num_sequences=data.num_sequences,
        num_truncated=data.num_truncated,
        num_dropped=data.num_dropped,
        tokens_per_epoch=shown.num_tokens,
        median=shown.median,
        longest=shown.longest,
        max_length=shown.max_length,
        lengths=[(each.up_to, each.num_rows) for each in shown.lengths],
    )


def _doubts_of_rows(spec: SweepSpec, shown: DataPreview, data: PreparedData) -> list[str]:
    """Return warnings that need the tokenized rows."""
    warnings, total = [], shown.num_train + shown.num_held_out + data.num_dropped
    if note := note_on_max_length(spec.data, spec.base):
        warnings.append(note)
    if data.num_truncated > _ALL_CUT * total:
        which = "all rows" if data.num_truncated >= total else f"{data.num_truncated} of {total} rows"
        warnings.append(
            f"data.max_length={spec.data.max_length}: {which} have more tokens (up to {shown.longest}) and are cut; "
            "raise it, or shorten the rows"
        )
    return warnings


def _notes(spec: SweepSpec, gpu: Gpu | None) -> list[str]:
    """Return what the plan leaves out."""
    notes = []
    if spec.search.repeats > 1:
        notes.append("the runs of search.repeats come on top")
    limits = {name: value for name, value in vars(spec.search.budget).items() if value is not None}
    for field, value in limits.items():
        notes.append(f"search.budget.{field} {value:g} may end the sweep earlier")
    if gpu is not None and not gpu.is_measured:
        notes.append(
            f"times are measured on an H200 and scaled to the {gpu.title} by the rates of NVIDIA's data sheets"
        )
    return notes


def _note_on_answers(answers: AnswerSize | None, shared: _Shared) -> list[str]:
    """Say what is counted for answers, and the memory of their keys and values."""
    if answers is None:
        return []
    if shared.pack is None or shared.outlook is None:
        return ["the time of answers for evaluation.metrics is not counted"]
    cache = answers.cache_bytes(shared.pack.shape, shared.outlook.gpu, shared.slots) / GIB
    when = "at each evaluation" if answers.at_evaluations else "after training"
    return [
        f"evaluation.metrics: {counted(answers.num_prompts, 'answer')} of {answers.new_tokens} tokens {when}; their "
        f"keys and values take {cache:.2g} GiB of the memory that is left free"
    ]


def _num_dropped(spec: SweepSpec, trials: Sequence[TrialConfig], outlooks: dict[BaseSection, Outlook]) -> int:
    """Return how many of these trials a sweep would drop because they cannot fit into memory."""
    if not spec.search.skip_unfit:
        return 0
    return sum(config.base in outlooks and outlooks[config.base].corner(config).fits is False for config in trials)


def _note_on_dropped(spec: SweepSpec, number: int, of: int) -> list[str]:
    if not number:
        return []
    instead = "are dropped" if spec.search.algorithm == "grid" else "would be dropped, and others drawn instead"
    return [f"search.skip_unfit: {number} of {counted(of, 'point')} cannot fit into memory and {instead}"]


def extreme_corners(corners: Sequence[CornerPlan]) -> list[CornerPlan]:
    """Return the largest and the smallest corner, or the only one."""
    return [*corners[:1], *corners[1:][-1:]]
