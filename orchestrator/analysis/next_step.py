"""What to try next, each with its command."""

import shlex
from dataclasses import dataclass, replace
from typing import Any, Final

import yaml

from orchestrator.analysis.effects import coordinate_of
from orchestrator.analysis.importance import Importances
from orchestrator.analysis.longer import Longer
from orchestrator.analysis.sweep_data import SweepData
from orchestrator.errors import SpecError
from orchestrator.record import OPEN, BudgetSpent, TrialState
from orchestrator.spec import parse_spec
from orchestrator.spec.axes import Axis
from orchestrator.spec.search import RATE, SEED
from orchestrator.spec.sections.scheduler import Brackets, Population
from orchestrator.sweep.repeats import MAX_FINALISTS
from orchestrator.sweep.reruns import point_of
from orchestrator.words import counted

EDGE: Final = 0.1
"""Share of a range at each end that counts as its edge."""
_WIDER: Final = 4
"""Factor by which a logarithmic range or a list of numbers is extended."""
EXPERIMENT: Final = "experiment.yaml"
"""Name of the experiment file where the sweep was not read from one."""


@dataclass(frozen=True)
class Edge:
    """A range at whose end the best trials are."""

    field: str
    side: str
    """`lowest` or `highest`."""
    limit: Any
    """The end of the range."""
    values: list[Any]
    """Values of the leader and of the trials tied with it."""
    space: dict[str, Any] | None
    """The search space with this range widened there; None if values beyond its end are not valid."""


@dataclass(frozen=True)
class Step:
    """Something to do, and the command for it."""

    why: str
    command: str


def find_edges(data: SweepData) -> list[Edge]:
    """Return the ranges of numbers at whose end the leader is, and every trial tied with it."""
    leader = data.leader
    if leader is None:
        return []
    tied = [each.candidate.trial for each in data.choice.recommendation.tied] if data.choice else []
    found = []
    for name, axis in data.info.spec.search.space.items():
        coordinate = coordinate_of(axis)
        values = [trial.config.varied[name] for trial in (leader, *tied) if name in trial.config.varied]
        if name == SEED or coordinate.is_category or name not in leader.config.varied or len(axis.probes()) < 2:
            continue
        places = [coordinate.at(value) for value in values]
        ends = (coordinate.values[0], coordinate.values[-1]) if coordinate.values else tuple(axis.probes())
        margin = 0.0 if coordinate.values else 2 * EDGE
        for side, limit, is_there in (
            ("lowest", ends[0], all(place <= -1 + margin for place in places)),
            ("highest", ends[1], all(place >= 1 - margin for place in places)),
        ):
            if is_there:
                found.append(Edge(name, side, limit, values, _wider_space(data, name, side)))
    return found


def widened(axis: Axis, side: str) -> dict[str, Any] | None:
    """Return an axis that goes on beyond one end; None if there is nothing sensible beyond it."""
    if axis.is_discrete:
        values = sorted(axis.values)
        more = values[-1] * 2 if side == "highest" else values[0] / 2
        if more == values[0] or (side == "lowest" and isinstance(values[0], int) and values[0] < 2):
            return None
        more = int(more) if all(isinstance(value, int) for value in values) else more
        if "log" not in axis.kind and side == "highest" and values[-1] <= 0:
            return None
        return {axis.kind: sorted({*values, more})}
    low, high, *step = axis.values
    if "log" in axis.kind:
        low, high = (low / _WIDER, high) if side == "lowest" else (low, high * _WIDER)
    else:
        width = high - low
        low, high = (low - width, high) if side == "lowest" else (low, high + width)
    if axis.is_whole:
        low, high = int(low), int(high)
    rounded = [each if isinstance(each, int) else float(f"{each:.6g}") for each in (low, high)]
    return None if rounded[0] <= 0 < axis.values[0] or rounded[0] < 0 <= axis.values[0] else {axis.kind: rounded + step}


def next_steps(data: SweepData, edges: list[Edge], found: Importances, longer: Longer | str) -> list[Step]:
    """Return what to try next, the most useful first."""
    folder = shlex.quote(str(data.record.paths.root))
    leader, choice = data.leader, data.choice
    steps: list[Step] = []
    if not data.is_over:
        left = max(data.info.num_trials - sum(trial.state not in OPEN for trial in data.trials), 0)
        what = counted(left, "trial has", "trials have") if left else "the runs of the finalists with other seeds have"
        why = f"{what} not ended; continue if no driver is running."
        steps.append(Step(why, resume_command(data)))
    if leader is None:
        failed = [trial for trial in data.trials if trial.state == TrialState.FAILED]
        if failed:
            rate = " Diverged trials usually need a lower learning rate." if _any_diverged(data) else ""
            steps.append(Step(f"Remove the cause of the failures, then start again.{rate}", reproduce_command(data)))
        return steps
    searches = []
    for edge in _worth_following(edges, found):
        why = f"The best trials are at the {edge.side} end of {edge.field}: search beyond {edge.limit:.3g}."
        searches.append(Step(why, _sweep(data, f"search.space={_yaml(edge.space)}")))
    if data.is_over and data.fields() and not any(each.matters for each in found.fields) and _can_grow(data):
        num = len(data.trials)
        why = f"No field's effect could be shown: run {num} more trials of this search (--trials is the new total)."
        searches.append(Step(why, f"{resume_command(data)} --trials {2 * num}"))
    steps += _as_alternatives(searches, len(steps) + 1)
    if isinstance(longer, Longer) and longer.chance >= 0.5 and not (longer.has_risen or longer.is_unsure):
        steps.append(Step("Train the leader with twice the steps.", _longer_trial(data, 2 * longer.steps)))
    steps += _more_seeds(data)
    if choice is not None:
        steps.append(Step("Score the adapter in the forms in which it can be used.", f"orchestrator evaluate {folder}"))
    return steps


def _as_alternatives(searches: list[Step], place: int) -> list[Step]:
    """Return steps that search further; all but the first, which has this place in the list, say that it would do."""
    mark = f" This is an alternative to suggestion {place}."
    return [replace(step, why=step.why + mark) if number else step for number, step in enumerate(searches)]


def _more_seeds(data: SweepData) -> list[Step]:
    """Return how to run the tied trials with more seeds, if the experiment allows that."""
    recommendation, repeats = data.choice.recommendation if data.choice else None, data.info.spec.search.repeats
    num_seeds = 2 * repeats + 1
    if recommendation is None or not recommendation.tied or not _is_valid(data, repeats=num_seeds):
        return []
    if repeats > 1 and not recommendation.over_seeds:  # the finalists are still to run again
        return []
    trials = [recommendation.leader.trial, *(each.candidate.trial for each in recommendation.tied)][:MAX_FINALISTS]
    points = [point_of(trial, data.info.spec) for trial in trials]
    why = (
        f"{counted(len(recommendation.tied), 'trial is', 'trials are')} tied with the winner. Resume cannot add seeds: "
        f"start a new sweep in which the finalists run with other seeds too, {num_seeds} seeds each."
    )
    sets: dict[str, Any] = {"search.repeats": num_seeds}
    only: dict[str, Any] = {"search.num_trials": len(points), "search.first": points}
    if _is_valid(data, **{name.removeprefix("search."): value for name, value in (sets | only).items()}):
        why += f" It tries only the {counted(len(points), 'best tied point')}."
        sets |= only | {"scheduler": {"kind": "none"}}
    return [Step(why, _sweep(data, *(f"{name}={_yaml(value)}" for name, value in sets.items())))]


def _worth_following(edges: list[Edge], found: Importances) -> list[Edge]:
    """Return the edges of fields that matter; if none is known to, that of the learning rate, or of the first field.

    Edges beyond which nothing is valid are left out.
    """
    edges = [edge for edge in edges if edge.space is not None]
    order = {each.field: place for place, each in enumerate(found.fields)}
    matters = {each.field for each in found.fields if each.matters}
    ranked = sorted(edges, key=lambda edge: (edge.field != RATE, order.get(edge.field, len(order))))
    return [edge for edge in ranked if edge.field in matters] if matters else ranked[:1]


def _can_grow(data: SweepData) -> bool:
    spec = data.info.spec
    is_fixed = spec.search.algorithm == "grid" or isinstance(spec.scheduler, Brackets | Population)
    is_spent = isinstance(data.why_over, BudgetSpent)  # --trials continues a sweep that has ended itself
    return not is_fixed and not is_spent and spec.search.num_points >= 2 * len(data.trials)


def reproduce_command(data: SweepData) -> str:
    """Return the command that runs the same sweep again."""
    verb = "trial" if data.info.is_single_trial else "sweep"
    source = data.info.source
    overrides = source.overrides if source else []
    changes = [f"{change.field}={_yaml(change.after)}" for change in data.info.changes]
    return _command(data, verb, [*overrides, *changes])


def resume_command(data: SweepData) -> str:
    """Return the command that continues the sweep."""
    return f"orchestrator resume {shlex.quote(str(data.record.paths.root))}"


def _wider_space(data: SweepData, field: str, side: str) -> dict[str, Any] | None:
    """Return the search space with a range that goes on beyond one end; None if the experiment refuses it."""
    axes = data.info.spec.search.space
    wider = widened(axes[field], side)
    if wider is None:
        return None
    space = {name: each.model_dump(mode="json") for name, each in axes.items()}
    space[field] |= wider
    return space if _is_valid(data, space=space) else None


def _is_valid(data: SweepData, **search: Any) -> bool:
    """Return whether the experiment allows these fields of the search section."""
    document = data.info.spec.model_dump(mode="json")
    document["search"] |= search
    if data.info.spec.search.algorithm == "grid":
        document["search"]["num_trials"] = None
    try:
        parse_spec(document)
    except SpecError:
        return False
    return True


def _longer_trial(data: SweepData, steps: int) -> str:
    """Return the command that trains the leader's values for so many steps.

    The search is replaced by its metric, which names the best evaluation: most searches are refused without their axes.
    """
    leader = data.leader
    assert leader is not None
    training = leader.config.training
    values = leader.config.varied | {"training.steps": steps}
    # The forecast is for the same schedule, stretched: lengths in steps grow with it, and shares of the steps stay.
    if training.epochs is not None:
        values["training.epochs"] = None
    if training.warmup >= 1:
        values["training.warmup"] = 2 * training.warmup
    if training.decay_steps is not None:
        values["training.decay_steps"] = 2 * training.decay_steps
    fixed = [f"search={_yaml({'metric': data.metric})}", "scheduler={kind: none}"]
    sets = [f"{name}={_yaml(value)}" for name, value in values.items()]
    return _command(data, "trial", [*_overrides(data, "search", "scheduler"), *fixed, *sets])


def _sweep(data: SweepData, *sets: str) -> str:
    replaced = {each.partition("=")[0] for each in sets}
    kept = [each for each in _overrides(data) if each.partition("=")[0] not in replaced]
    return _command(data, "sweep", [*kept, *sets])


def _overrides(data: SweepData, *without: str) -> list[str]:
    """Return the overrides of the sweep, without those of the sections that a trial by itself does not use."""
    given = data.info.source.overrides if data.info.source else []
    return [
        each for each in given if not each.startswith(tuple(f"{section}{end}" for section in without for end in ".="))
    ]


def _command(data: SweepData, verb: str, overrides: list[str]) -> str:
    """Return a command on the sweep's experiment, which starts where its relative paths do and has a folder of its own.

    Without `output.name` a new sweep is named after its file and the time; with it, this sweep's folder would be taken.
    """
    source = data.info.source
    is_relative = any(each.startswith(("base", "data")) for each in overrides)
    place = f"cd {shlex.quote(source.folder)} && " if source and is_relative else ""
    name = ["output.name=null"] if data.info.spec.output.name is not None else []
    sets = [f"--set {_quoted(override)}" for override in [*overrides, *name]]
    return place + " ".join(["orchestrator", verb, shlex.quote(source.file if source else EXPERIMENT), *sets])


def _quoted(text: str) -> str:
    """Return text as one word of a shell, on one line: bash and zsh read `$'...'` with escaped line breaks."""
    if "\n" not in text:
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'"


def _yaml(value: Any) -> str:
    """Return a value as `--set` reads it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _any_diverged(data: SweepData) -> bool:
    return any(trial.failure == "diverged" for trial in data.trials)
