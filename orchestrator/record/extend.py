"""Give an existing sweep more trials or another budget, and compare it with its experiment file."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.record.models import SpecChange, SweepInfo, TrialState
from orchestrator.record.sweep_record import SweepRecord, read_sweep, write_info
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.spec.dotted import read_path
from orchestrator.spec.load import override_spec
from orchestrator.spec.search import Budget
from orchestrator.spec.sections.scheduler import Brackets, Population

_BUDGET = "search.budget."
_STOP = "search.stop."
_MAX_SHOWN = 60
"""Maximum length of a value in a message, in characters."""


def extend_sweep(
    record: SweepRecord, num_trials: int | None, budget: Sequence[str], request: str | None = None
) -> SweepRecord:
    """Return the sweep with more trials or another budget. Nothing is written; `save_extension` does that.

    Args:
        record: the sweep.
        num_trials: total number of trials that it is to have; None leaves the number as it is. In a sweep that has
            ended itself, it lifts `search.stop`, whose rule would end the sweep again at once.
        budget: `field=value` for fields of `search.budget`; the value `null` removes the limit.
        request: name of the request that asks for it; None for `resume`.

    Raises:
        RequestError: the sweep cannot be extended so; the message gives the reason.
    """
    overrides = []
    if num_trials is not None:
        _require_extensible(record, num_trials)
        if record.info.spec.search.algorithm != "grid":  # which always has as many as points
            overrides.append(f"search.num_trials={num_trials - len(record.info.added)}")
        if record.search_ended() is not None:
            overrides += [f"{_STOP}{rule}=null" for rule, value in _rules(record.info) if value is not None]
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
        SpecChange(changed=now, field=path, before=_value(before, path), after=_value(after, path), request=request)
        for path in paths
    ]
    changes = [change for change in changes if change.before != change.after]
    info = record.info.model_copy(update={"spec": after, "changes": [*record.info.changes, *changes]})
    return SweepRecord(record.paths, info)


def save_extension(record: SweepRecord) -> None:
    """Write the changes of `extend_sweep`, and remove records that no longer hold.

    The caller must be the only driver of the sweep.
    """
    known = read_sweep(record.paths.root).info.changes
    if record.info.changes != known:
        if any(change.field.startswith(_BUDGET) for change in record.info.changes[len(known) :]):
            # First, because a killed driver leaves no other sign of it. It is written again when the budget is spent.
            record.paths.budget.unlink(missing_ok=True)
        write_info(record.paths, record.info)
    if not record.info.spec.search.stop.is_set:  # lifted now, or by a driver that was killed before the next line
        record.paths.search_ended.unlink(missing_ok=True)


def changed_since(info: SweepInfo) -> list[str]:
    """Describe how the experiment file differs from the recorded experiment, one line for each field.

    Returns:
        An empty list if the file is unknown or missing.
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


def _rules(info: SweepInfo) -> list[tuple[str, Any]]:
    stop = info.spec.search.stop
    return [("gain", stop.gain), ("unmoved", stop.unmoved)]


def _require_extensible(record: SweepRecord, num_trials: int) -> None:
    """Raise RequestError if a sweep cannot have this total number of trials."""
    info = record.info
    search, scheduler = info.spec.search, info.spec.scheduler
    if info.is_single_trial or not search.space:
        raise RequestError("--trials: nothing is searched here, there is one trial; start a sweep over a search.space")
    if search.algorithm == "grid" and record.search_ended() is not None:
        if num_trials != info.num_trials:
            raise RequestError(f"--trials {num_trials}: the grid has {info.num_trials} points; give that number")
    elif search.algorithm == "grid":
        raise RequestError("--trials: a grid tries each of its points once; start a new sweep over another space")
    if isinstance(scheduler, Brackets | Population):
        raise RequestError(
            f"--trials: scheduler {scheduler.kind} compares trials that begin together, and later ones would have "
            "none to compare with; start a new sweep"
        )
    present = info.num_trials
    if record.search_ended() is not None:
        present = sum(trial.state != TrialState.CANCELLED for trial in record.trials())
    if num_trials <= present:
        raise RequestError(
            f"--trials {num_trials}: the sweep already has {present}; give the total number, not the difference"
        )


def _require_limit(info: SweepInfo, written: str) -> None:
    """Raise RequestError if `--budget` is not written as a limit and its value."""
    name, equals, _ = written.partition("=")
    if not equals or name not in Budget.model_fields:
        raise RequestError(
            f"--budget {written}: must be LIMIT=V, where LIMIT is one of {', '.join(Budget.model_fields)}"
        )
    if info.is_single_trial:
        raise RequestError(f"--budget {written}: this is a single trial, and only a sweep has a budget")


def _value(spec: SweepSpec, path: str) -> Any:
    try:
        return read_path(spec.model_dump(mode="json"), path)
    except KeyError:
        return None


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted field -> value. Keys of search.space and search.tied are dotted already and look the same."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        path = f"{prefix}{name}"
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return flat


def _show(document: dict[str, Any], path: str, whole: bool = False) -> str:
    if path not in document:
        return "nothing"
    shown = repr(document[path])
    return shown if whole or len(shown) <= _MAX_SHOWN else f"{shown[: _MAX_SHOWN - 3]}..."
