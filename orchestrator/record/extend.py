"""More trials, or another budget, for a sweep that goes on; and what has changed in its experiment file since."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.record.files import write_atomic
from orchestrator.record.models import SpecChange, SweepInfo
from orchestrator.record.sweep_record import SweepRecord, read_sweep
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.spec.dotted import read_path
from orchestrator.spec.load import override_spec
from orchestrator.spec.search import Budget
from orchestrator.spec.sections.scheduler import Brackets, Population

_BUDGET = "search.budget."
_MOST_SHOWN = 60
"""Characters of a value in a message."""


def extend_sweep(record: SweepRecord, num_trials: int | None, budget: Sequence[str]) -> SweepRecord:
    """Return the sweep with more trials or another budget. Nothing is written; `save_extension` does that.

    Args:
        record: the sweep.
        num_trials: trials that it is to have in all; None leaves the number as it is.
        budget: `field=value` for fields of `search.budget`; a value of `null` takes the limit away.

    Raises:
        RequestError: the sweep cannot have these, with the reason.
    """
    overrides = []
    if num_trials is not None:
        _require_extensible(record.info, num_trials)
        overrides.append(f"search.num_trials={num_trials}")
    for limit in budget:
        _require_limit(record.info, limit)
        overrides.append(_BUDGET + limit)
    if not overrides:
        return record
    before = record.info.spec
    after = override_spec(before.model_dump(mode="json"), overrides, "resume")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    paths = [override.partition("=")[0] for override in overrides]
    changes = [
        SpecChange(changed=now, field=path, before=_value(before, path), after=_value(after, path)) for path in paths
    ]
    changes = [change for change in changes if change.before != change.after]
    info = record.info.model_copy(update={"spec": after, "changes": [*record.info.changes, *changes]})
    return SweepRecord(record.paths, info)


def save_extension(record: SweepRecord) -> None:
    """Write the changes of `extend_sweep`, if there are any. Call it as the only driver of the sweep."""
    known = read_sweep(record.paths.root).info.changes
    if record.info.changes == known:
        return
    write_atomic(record.paths.sweep, record.info.model_dump_json(indent=2) + "\n")
    if any(change.field.startswith(_BUDGET) for change in record.info.changes[len(known) :]):
        record.paths.budget.unlink(missing_ok=True)  # it is written again where the new budget is spent too


def changed_since(info: SweepInfo) -> list[str]:
    """Describe how the experiment file differs from the recorded experiment, a line for each field.

    Returns:
        Nothing where the file is not known or not there.
    """
    source = info.source
    if source is None or not Path(source.file).is_file():
        return []
    try:
        now = load_spec(source.file, source.overrides, Path(source.folder)).model_dump(mode="json")
    except OrchestratorError as error:
        return [f"it is no longer a valid experiment: {error.message}"]
    recorded, written = _flat(info.spec.model_dump(mode="json")), _flat(now)
    changed = {change.field for change in info.changes}
    return [
        f"{path}: {_show(recorded, path)} recorded, {_show(written, path)} in the file"
        for path in dict.fromkeys([*recorded, *written])
        if path not in changed and _show(recorded, path, whole=True) != _show(written, path, whole=True)
    ]


def _require_extensible(info: SweepInfo, num_trials: int) -> None:
    """Raise RequestError where a sweep cannot have so many trials in all."""
    search, scheduler = info.spec.search, info.spec.scheduler
    if info.is_single_trial or not search.space:
        raise RequestError("--trials: nothing is searched here, and there is one trial")
    if search.algorithm == "grid":
        raise RequestError("--trials: a grid has a number of its own; start a new sweep over another space")
    if isinstance(scheduler, Brackets | Population):
        raise RequestError(
            f"--trials: scheduler {scheduler.kind} compares trials that begin together, and later ones would have "
            "nobody to be compared with; start a new sweep"
        )
    if num_trials <= info.num_trials:
        raise RequestError(
            f"--trials {num_trials}: the sweep has {info.num_trials} already; give the number that it is to have in all"
        )


def _require_limit(info: SweepInfo, written: str) -> None:
    """Raise RequestError where `--budget` is not written as a limit and its value."""
    name, equals, _ = written.partition("=")
    if not equals or name not in Budget.model_fields:
        raise RequestError(f"--budget {written}: must be LIMIT=V, where LIMIT is {', '.join(Budget.model_fields)}")
    if info.is_single_trial:
        raise RequestError(f"--budget {written}: this is a single trial, and a budget belongs to a sweep")


def _value(spec: SweepSpec, path: str) -> Any:
    try:
        return read_path(spec.model_dump(mode="json"), path)
    except KeyError:
        return None


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted field -> value. The maps of a search have dotted names as keys, and end up in the same form."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        path = f"{prefix}{name}"
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return flat


def _show(document: dict[str, Any], path: str, whole: bool = False) -> str:
    if path not in document:
        return "nothing"
    shown = repr(document[path])
    return shown if whole or len(shown) <= _MOST_SHOWN else f"{shown[: _MOST_SHOWN - 3]}..."
