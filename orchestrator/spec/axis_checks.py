"""Check every value of the search space before a trial meets one that does not fit."""

from dataclasses import replace
from typing import Any

from orchestrator.spec.axes import WHOLE_KINDS, Axis
from orchestrator.spec.messages import describe, types_of
from orchestrator.spec.sections import Section, TrialConfig
from orchestrator.spec.suggestions import suggested_field
from orchestrator.spec.trial_space import Point, TrialSpace

# Trials are compared on the same held-out tokens, so fields that change the tokens cannot be searched.
_CHANGES_TOKENS = (
    "base.model",
    "base.revision",
    "base.trust_remote_code",
    "base.pad_token",
    "base.eos_token",
    "base.new_tokens",
)


def check_axes(trials: TrialSpace) -> None:
    """Try representative values of all axes, alone and in combination.

    Raises:
        ValueError: names the fault, and the searched or tied values that cause it, if any do.
    """
    for path in (*trials.search.space, *trials.search.tied):
        check_searchable(path)
    for path, axis in trials.search.space.items():
        _require_kind(path, axis)
    for point in [*trials.edges(), *trials.combinations()]:
        config_at(trials, point)
    for path, axis in trials.search.space.items():
        if axis.is_discrete:
            _require_different(trials, path, axis.values)


def config_at(trials: TrialSpace, point: Point) -> TrialConfig:
    """Return the configuration at a point; raises ValueError as `check_axes` does."""
    try:
        return trials.config(point)
    except ValueError as error:
        raise ValueError(_with_causes(trials, point, _first_fault(error))) from error


def check_searchable(path: str) -> None:
    """Raise ValueError if a dotted field can be neither searched nor tied."""
    section, _, field = path.partition(".")
    if section == "data" or path in _CHANGES_TOKENS:
        raise ValueError(
            f"search: {path} cannot vary: rows are tokenized once, and trials are compared on the same held-out tokens"
        )
    if section not in ("base", "lora", "training"):
        raise ValueError(f"search: {path} is not a field of a trial; axes are fields of base, lora or training")
    model = _section(section)
    if field not in model.model_fields:
        found = suggested_field(path, model, TrialConfig)
        hint = f"did you mean {found}? " if found else ""
        raise ValueError(
            f"search: there is no field {path}; {hint}fields of {section}: {', '.join(model.model_fields)}"
        )


def _require_different(trials: TrialSpace, path: str, values: list[Any]) -> None:
    """Raise ValueError if two listed values are the same value of the field, such as 16 and 16.0."""
    section, _, field = path.partition(".")
    others = {other: axis.probes()[0] for other, axis in trials.search.space.items()} | trials.search.needed(path)
    seen: dict[str, Any] = {}
    for value in values:
        config = config_at(trials, trials.search.active(others | {path: value}))
        resolved = repr(getattr(getattr(config, section), field))
        if resolved in seen:
            raise ValueError(
                f"search.space.{path}: {seen[resolved]!r} and {value!r} are the same value, {resolved}; leave one out"
            )
        seen[resolved] = value


def _require_kind(path: str, axis: Axis) -> None:
    """Raise ValueError for a range of real numbers on a field that takes only whole ones."""
    section, _, field = path.partition(".")
    types = types_of(_section(section).model_fields[field].annotation)
    if int in types and float not in types and not axis.is_discrete and not axis.is_whole:
        raise ValueError(
            f"search.space.{path}: a field of whole numbers takes choice, {', '.join(WHOLE_KINDS)}, "
            f"not {axis.kind} {axis.values}"
        )


def _section(name: str) -> type[Section]:
    section: Any = TrialConfig.model_fields[name].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    return section


def _fault(trials: TrialSpace, point: Point) -> str | None:
    try:
        trials.config(point)
    except ValueError as error:
        return _first_fault(error)
    return None


def _first_fault(error: ValueError) -> str:
    return describe(error, TrialConfig)[0]


def _with_causes(trials: TrialSpace, point: Point, fault: str) -> str:
    """Prefix a fault with the axes and the tied field that cause it.

    A cause is found by trial: with another of its values, or without it, the fault would be another one.
    """
    tied = trials.search.tied
    causes = [path for path in tied if _fault(_without_tied(trials, path), point) != fault]
    message = fault
    if causes and not fault.startswith("search.tied."):  # the last may build on those before it
        message = f"search.tied.{causes[-1]}: {tied[causes[-1]]!r} gives {fault}"
    axes = [
        path for path in point if any(_fault(trials, other) != fault for other in _other_points(trials, point, path))
    ]
    parents = {parent for path in axes for parent in trials.search.ancestors(path)}
    match [path for path in axes if path not in parents]:
        case []:
            return message
        case [path]:
            return f"search.space.{path}: the value {point[path]!r} gives {message}"
        case paths:
            return f"search.space: {' with '.join(f'{path} {point[path]!r}' for path in paths)} gives {message}"


def _without_tied(trials: TrialSpace, path: str) -> TrialSpace:
    tied = {other: expression for other, expression in trials.search.tied.items() if other != path}
    return replace(trials, search=trials.search.model_copy(update={"tied": tied}))


def _other_points(trials: TrialSpace, point: Point, path: str) -> list[dict[str, Any]]:
    """Return the point without one field (which then has the file's value), and with each probe of its axis."""
    without = {other: value for other, value in point.items() if other != path}
    return [without, *({**point, path: value} for value in trials.search.space[path].probes())]
