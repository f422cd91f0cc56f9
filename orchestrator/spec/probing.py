"""Whether every value of every axis and tie fits, before a trial meets one that does not."""

import itertools
import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.spec.axes import WHOLE_KINDS, Axis
from orchestrator.spec.messages import describe, types_of
from orchestrator.spec.names import meant
from orchestrator.spec.sections import Section, TrialConfig

if TYPE_CHECKING:
    from orchestrator.spec.sweep_spec import SweepSpec

# Trials are compared on the same held-out tokens: what makes the tokens cannot be searched.
_MAKES_TOKENS = (
    "base.model",
    "base.revision",
    "base.trust_remote_code",
    "base.pad_token",
    "base.eos_token",
    "base.new_tokens",
)
_MOST_CHECKED = 256

_Point = Mapping[str, Any]


def check_axes(spec: "SweepSpec") -> None:
    """Try the values that stand for all, alone and together.

    Raises:
        ValueError: with what is wrong, and the searched or tied values that make it wrong, if any do.
    """
    for path in (*spec.search.space, *spec.search.tied):
        check_searchable(path)
    for path, axis in spec.search.space.items():
        _require_kind(path, axis)
    for point in [*spec.edges(), *combinations(spec)]:
        config_at(spec, point)
    for path, axis in spec.search.space.items():
        if axis.is_discrete:
            _require_different(spec, path, axis.values)


def config_at(spec: "SweepSpec", point: _Point) -> TrialConfig:
    """The configuration at a point; raises ValueError as `check_axes` does."""
    try:
        return spec.trial_config(point)
    except ValueError as error:
        raise ValueError(_blamed(spec, point, _told(error))) from error


def check_searchable(path: str) -> None:
    """Raises ValueError where a dotted field can be neither searched nor tied."""
    section, _, field = path.partition(".")
    if section == "data" or path in _MAKES_TOKENS:
        raise ValueError(
            f"search: {path} cannot vary: rows are tokenised once, and trials are compared on the same held-out tokens"
        )
    if section not in ("base", "lora", "training"):
        raise ValueError(f"search: {path} is not a field of a trial; axes lie in base, lora or training")
    model = _section(section)
    if field not in model.model_fields:
        found = meant(path, model, TrialConfig)
        hint = f"did you mean {found}? " if found else ""
        raise ValueError(
            f"search: there is no field {path}; {hint}fields of {section}: {', '.join(model.model_fields)}"
        )


def _require_different(spec: "SweepSpec", path: str, values: list[Any]) -> None:
    """Raise ValueError for two listed values that are one value of the field, such as 16 and 16.0."""
    section, _, field = path.partition(".")
    others = {other: axis.probes()[0] for other, axis in spec.search.space.items()} | spec.search.needed(path)
    seen: dict[str, Any] = {}
    for value in values:
        config = config_at(spec, spec.search.active(others | {path: value}))
        resolved = repr(getattr(getattr(config, section), field))
        if resolved in seen:
            raise ValueError(
                f"search.space.{path}: {seen[resolved]!r} and {value!r} are the same value, {resolved}; leave one out"
            )
        seen[resolved] = value


def _require_kind(path: str, axis: Axis) -> None:
    """Raises ValueError for a range of real numbers on a field that takes whole ones alone."""
    section, _, field = path.partition(".")
    types = types_of(_section(section).model_fields[field].annotation)
    if int in types and float not in types and not axis.is_discrete and not axis.is_whole:
        raise ValueError(
            f"search.space.{path}: a field of whole numbers takes choice, {', '.join(WHOLE_KINDS)}, "
            f"but not {axis.kind} {axis.values}"
        )


def _section(name: str) -> type[Section]:
    section: Any = TrialConfig.model_fields[name].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    return section


def combinations(spec: "SweepSpec") -> list[dict[str, Any]]:
    """Every combination of the axes' probes; of very many, a seeded draw."""
    probes = {path: axis.probes() for path, axis in spec.search.space.items()}
    if math.prod(map(len, probes.values())) <= _MOST_CHECKED:
        points = [dict(zip(probes, values, strict=True)) for values in itertools.product(*probes.values())]
    else:
        draw = random.Random(0)
        points = [{path: draw.choice(values) for path, values in probes.items()} for _ in range(_MOST_CHECKED)]
    return [spec.search.active(point) for point in points]


def _fault(spec: "SweepSpec", point: _Point) -> str | None:
    try:
        spec.trial_config(point)
    except ValueError as error:
        return _told(error)
    return None


def _told(error: ValueError) -> str:
    return describe(error, TrialConfig)[0]


def _blamed(spec: "SweepSpec", point: _Point, fault: str) -> str:
    """A fault, after the axes and the tie that make it: with other values of theirs, or none, it would not be told."""
    tied = spec.search.tied
    ties = [path for path in tied if _fault(_without_tie(spec, path), point) != fault]
    told = fault
    if ties and not fault.startswith("search.tied."):  # the last may build on those before it
        told = f"search.tied.{ties[-1]}: {tied[ties[-1]]!r} gives {fault}"
    makers = [path for path in point if any(_fault(spec, other) != fault for other in _other_points(spec, point, path))]
    above = {parent for path in makers for parent in spec.search.ancestors(path)}
    match [path for path in makers if path not in above]:
        case []:
            return told
        case [path]:
            return f"search.space.{path}: the value {point[path]!r} gives {told}"
        case paths:
            return f"search.space: {' with '.join(f'{path} {point[path]!r}' for path in paths)} gives {told}"


def _without_tie(spec: "SweepSpec", path: str) -> "SweepSpec":
    tied = {other: expression for other, expression in spec.search.tied.items() if other != path}
    return spec.model_copy(update={"search": spec.search.model_copy(update={"tied": tied})})


def _other_points(spec: "SweepSpec", point: _Point, path: str) -> list[dict[str, Any]]:
    """A point with the file's value of one field, and with those of its axis that stand for all."""
    without = {other: value for other, value in point.items() if other != path}
    return [without, *({**point, path: value} for value in spec.search.space[path].probes())]
