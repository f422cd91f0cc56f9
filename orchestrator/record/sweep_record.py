"""Read a sweep back from its folder. What is on disk is authoritative; everything else is a view of it."""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from orchestrator.errors import RecordError
from orchestrator.record.absent import require_present
from orchestrator.record.answers import Answers
from orchestrator.record.budget import BudgetSpent
from orchestrator.record.checked import DamagedError, read_lines, read_record, write_record
from orchestrator.record.checkpoints import checkpoint_steps, step_of
from orchestrator.record.decisions import read_decisions
from orchestrator.record.models import (
    AddedTrial,
    BestPoint,
    ExploitCheckpoint,
    MetricPoint,
    SweepInfo,
    TrialResult,
    TrialState,
    time_now,
)
from orchestrator.record.paths import SweepPaths, TrialPaths
from orchestrator.record.pulled import require_pulled
from orchestrator.record.search_ended import SearchEnded
from orchestrator.record.test_score import TestScore
from orchestrator.spec import TrialConfig
from orchestrator.spec.output_uri import is_uri

_T = TypeVar("_T", BudgetSpent, SearchEnded, TestScore, Answers)

# States of trials whose adapter may be chosen: a running trial can still improve, a failed one is not trusted.
CHOOSABLE = (TrialState.COMPLETE, TrialState.STOPPED)

LAST_PULLED = "adapter_config.json"
"""The file of an adapter that is pulled last: with it, the adapter is complete."""

OPEN = (TrialState.PENDING, TrialState.RUNNING, TrialState.PAUSED)
"""States of trials that have not ended."""


def _fetch_nothing(folder: Path) -> None:
    """Fetch nothing: all of the sweep is here. Not a lambda, so that records can be pickled."""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep, read from its folder."""

    paths: SweepPaths
    info: SweepInfo
    fetch: Callable[[Path], None] = field(default=_fetch_nothing, compare=False, repr=False)
    """Fetches a folder of the sweep if it is in an object store and not here yet."""

    def trials(self) -> list[TrialResult]:
        """Return all trials, best first; those without an evaluation last. `record.damage` names unreadable ones."""
        return best_first(read_trials(self.paths, self.info))

    def finished(self) -> list[TrialResult]:
        """Return trials whose adapter may be chosen (COMPLETE or STOPPED, with an evaluation), best first."""
        return [trial for trial in self.trials() if trial.state in CHOOSABLE and trial.best]

    def budget_spent(self) -> BudgetSpent | None:
        """Return the limit that was reached, if one was; there may then be fewer trials than requested."""
        return _optional(BudgetSpent, self.paths.budget)

    def search_ended(self) -> SearchEnded | None:
        """Return why the sweep has ended itself, if it has; no further trial is then drawn."""
        return _optional(SearchEnded, self.paths.search_ended)

    def num_trials(self) -> int:
        """Return the number of trials of the sweep, unless its budget is spent before.

        Points that were dropped because they cannot fit into memory may leave fewer than were requested.
        """
        search = self.info.spec.search
        if self.info.is_single_trial or not search.skip_unfit:
            return self.info.num_trials
        num_dropped = sum(decision.action == "dropped" for decision in read_decisions(self.paths))
        num_left = search.num_points - num_dropped
        return int(min(search.total_trials, num_left)) + len(self.info.added)

    def why_over(self) -> BudgetSpent | SearchEnded | None:
        """Return why no further trial begins, if that is so; there may then be fewer trials than requested."""
        return self.budget_spent() or self.search_ended()

    def test_score(self) -> TestScore | None:
        """Return the winner's scores on the test rows, if they were measured."""
        return _optional(TestScore, self.paths.test)

    def answers(self) -> Answers | None:
        """Return answers of the base and of the recommended adapter, if they were recorded."""
        return _optional(Answers, self.paths.answers)

    def rows(self) -> Path:
        """Return the folder of the tokenized rows.

        Raises:
            NotPulledError: they were left out when the sweep was pulled.
        """
        self.fetch(self.paths.data)
        require_pulled(self.paths, self.paths.data / "meta.json", "the tokenized rows were", "--rows")
        return self.paths.data

    def adapter_path(self, trial: TrialResult) -> Path:
        """Return where the adapter of a trial's best evaluation should be."""
        assert trial.best is not None
        return self.paths.trial(trial.trial_id).root / trial.best.adapter

    def adapter(self, trial: TrialResult) -> Path:
        """Return the folder of the adapter of a trial's best evaluation.

        Raises:
            AbsentError: `orchestrator clean` has removed it.
            NotPulledError: it was left out when the sweep was pulled.
            RecordError: it is missing, or the record or a symbolic link leads out of the sweep's folder.
        """
        require_present(self.paths, trial.trial_id)
        folder = self.adapter_path(trial)
        self.fetch(folder)
        require_pulled(self.paths, folder / LAST_PULLED, f"{trial.trial_id}: its adapter was", "--adapters all")
        if not folder.is_dir():
            raise RecordError(f"{folder}: the adapter of trial {trial.trial_id} is missing")
        if folder.resolve() != self.paths.root.resolve() / folder.relative_to(self.paths.root):
            raise RecordError(
                f"{folder}: the adapter of trial {trial.trial_id} is outside the sweep: its path leads to "
                f"{folder.resolve()}",
                "Put the folder itself in its place; symbolic links in a sweep are not followed.",
            )
        return folder


def read_sweep(sweep: str | Path, output: str | Path = "runs") -> SweepRecord:
    """Open a sweep by its folder, or by its name under `output`.

    Raises:
        RecordError: there is no such sweep, or its record cannot be read.
    """
    require_folder(sweep, output)
    for root in (Path(sweep), Path(output) / sweep):
        try:
            paths = SweepPaths(root.resolve())
            found = paths.sweep.is_file()
        except (OSError, ValueError) as error:  # a name that is too long for a path, or has a null byte
            raise RecordError(f"{sweep!s:.80}: is not the name of a sweep: {error}") from error
        if found:
            return SweepRecord(paths, _read_info(paths))
    if Path(sweep).suffix in (".yaml", ".yml"):
        raise RecordError(f"{sweep}: is an experiment file, not a sweep", "Give the folder of a sweep, or its name.")
    raise RecordError(
        f"{sweep}: there is no such sweep (no sweep.json in {sweep} or {Path(output) / sweep})",
        "Give the sweep's folder, or its name together with --output.",
    )


def require_folder(sweep: str | Path, output: str | Path) -> None:
    """Check that a sweep is named by its folder, for what cannot be done in an object store.

    Raises:
        RecordError: it is named by its URI, or by its name under one.
    """
    if any(is_uri(str(each)) for each in (sweep, output)):
        where = sweep if is_uri(str(sweep)) else f"{output}/{sweep}"
        raise RecordError(
            f"{where}: is in an object store, where this command cannot work",
            "Give the folder of its driver, or of a copy: `orchestrator pull` makes one.",
        )


def _optional(model: type[_T], path: Path) -> _T | None:
    """Return a record; None if there is none, or if it is damaged, which `record.damage` names."""
    with suppress(FileNotFoundError, DamagedError):
        return read_record(model, path)
    return None


def _read_info(paths: SweepPaths) -> SweepInfo:
    """Return what is known of a sweep, from the copy if the record is damaged."""
    try:
        return read_record(SweepInfo, paths.sweep)
    except DamagedError:
        if not paths.sweep_copy.is_file():
            raise
        return read_record(SweepInfo, paths.sweep_copy)


def write_info(paths: SweepPaths, info: SweepInfo) -> None:
    """Write what is known of a sweep, and a copy: nothing in the folder can be read without it."""
    write_record(paths.sweep, info)
    write_record(paths.sweep_copy, info)


def read_trials(paths: SweepPaths, info: SweepInfo) -> list[TrialResult]:
    """Return all trials of which enough is left, the oldest first."""
    trials = []
    for trial_id in paths.trial_ids():
        with suppress(DamagedError):
            trials.append(read_trial(paths.trial(trial_id), info))
    return trials


def best_first(trials: Iterable[TrialResult]) -> list[TrialResult]:
    """Sort trials by their best evaluations; those without an evaluation come last."""
    return sorted(
        trials, key=lambda r: (r.best is None, (r.best.value if r.mode == "min" else -r.best.value) if r.best else 0.0)
    )


def read_trial(paths: TrialPaths, info: SweepInfo) -> TrialResult:
    """Return one trial: its result, or its progress, or PENDING with its configuration.

    A damaged record is passed over, see `record.damage`: the progress of an ended trial holds its result too, and the
    progress of an open one is put together from its other files.

    Raises:
        RecordError: it has not begun, or there is no such trial.
        DamagedError: too little of the trial's files is left.
    """
    for path in (paths.result, paths.progress):
        if path.is_file():
            with suppress(DamagedError):
                trial = read_own(paths, path)
                is_paused = trial.state == TrialState.RUNNING and paths.paused.is_file()
                return trial.model_copy(update={"state": TrialState.PAUSED}) if is_paused else trial
    if not (paths.config.is_file() or paths.result.is_file() or paths.progress.is_file()):
        raise RecordError(
            f"{paths.trial_id}: the trial has not begun, or the sweep has no such trial",
            f"`orchestrator status {paths.sweep}` lists those that have begun.",
        )
    search = info.spec.search
    trial = TrialResult(
        trial_id=paths.trial_id,
        state=TrialState.PENDING,
        config=read_record(TrialConfig, paths.config),
        metric=search.metric,
        mode=search.resolved_mode,
    )
    return _put_together(paths, trial) if paths.progress.is_file() else trial


def _put_together(paths: TrialPaths, new: TrialResult) -> TrialResult:
    """Return an open trial whose progress is damaged, from its points, checkpoints and adapters."""
    points, steps = read_metrics(paths), checkpoint_steps(paths)
    checkpoint = f"checkpoints/checkpoint-{steps[0]}" if steps else None
    best = None
    for folder in paths.adapters.glob("step-*"):
        step, values = step_of(folder.name), dict[str, float]()
        for point in points:
            values |= point.values if point.step == step else {}
        if new.metric in values:
            adapter = str(folder.relative_to(paths.root))
            best = BestPoint(value=values[new.metric], step=step, values=values, adapter=adapter)
    update: dict[str, object] = {"state": TrialState.RUNNING, "best": best, "checkpoint": checkpoint}
    if points:
        update |= {"step": points[-1].step, "tokens": points[-1].tokens, "seconds": points[-1].time_s}
    if steps:
        with suppress(OSError, ValueError, KeyError):  # a damaged checkpoint is found when the trial resumes
            state = json.loads((paths.checkpoints / f"checkpoint-{steps[0]}" / "trainer_state.json").read_bytes())
            update["total_steps"] = int(state["max_steps"])
    return new.model_copy(update=update)


def read_own(paths: TrialPaths, path: Path) -> TrialResult:
    """Read the result or the progress of a trial.

    Raises:
        DamagedError: it is damaged, or is that of another trial.
        OSError: it cannot be read.
    """
    trial = read_record(TrialResult, path)
    if trial.trial_id != paths.trial_id:
        raise DamagedError(f"{path}: is the record of another trial, {trial.trial_id}")
    return trial


def read_result(paths: TrialPaths) -> TrialResult:
    """Return the result of a trial that has ended.

    Raises:
        DamagedError: neither the result nor the progress, which holds it too, is whole.
    """
    try:
        return read_own(paths, paths.result)
    except DamagedError:
        if paths.progress.is_file() and (last := read_own(paths, paths.progress)).state not in OPEN:
            return last
        raise


def read_added(paths: TrialPaths) -> AddedTrial | None:
    """Return how a trial was added by a request; None for a trial of the search."""
    return read_record(AddedTrial, paths.added) if paths.added.is_file() else None


def read_exploit_checkpoint(path: Path) -> ExploitCheckpoint:
    """Return what one of Tune's checkpoints refers to.

    Raises:
        RecordError: the file is damaged.
    """
    return read_record(ExploitCheckpoint, path)


def read_metrics(paths: TrialPaths) -> list[MetricPoint]:
    """Return every point of a trial in order. Lines that are cut or damaged are left out."""
    return read_lines(MetricPoint, paths.metrics).records


def end_trial(paths: TrialPaths, result: TrialResult) -> TrialResult:
    """Write the final result of a trial, and remove its checkpoints.

    The progress then becomes a copy of the result, from which a damaged result is read.
    """
    result = result.model_copy(update={"checkpoint": None, "ended": time_now()})
    write_record(paths.result, result)
    write_record(paths.progress, result)
    shutil.rmtree(paths.checkpoints, ignore_errors=True)
    return result
