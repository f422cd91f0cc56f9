"""The public Python API: start, resume and open a sweep. Import its functions from `orchestrator`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.deploy import FinishedSweep
from orchestrator.errors import RequestError
from orchestrator.record import MetricPoint, SweepRecord, TrialResult
from orchestrator.remote.view import view_sweep
from orchestrator.spec import SweepSpec

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

    from orchestrator.analysis.sweep_data import SweepData
    from orchestrator.record.requests import Verb

__all__ = ["Sweep", "open_sweep", "resume", "run"]

Watch = Callable[[list[TrialResult]], None]
"""Called with all trials that have started, best first, whenever one of them changes."""

Say = Callable[[str], None]
"""Called with messages to the user, such as warnings."""


class Sweep(FinishedSweep):
    """A sweep with its results, as pandas frames and as Plotly figures.

    Each call reads the records anew. What is damaged is left out; `orchestrator report` names it.
    """

    def trials(self) -> "DataFrame":
        """Return one row for each trial, best first: state, values, costs, searched fields. See `record.trials()` for
        the records themselves."""
        from orchestrator.analysis.frames import trials_frame

        return trials_frame(self._data())

    def curves(self) -> "DataFrame":
        """Return one row for each metric point: trial, step, tokens, seconds, GPU seconds and metrics."""
        from orchestrator.analysis.frames import curves_frame

        return curves_frame(self._data())

    def decisions(self) -> "DataFrame":
        """Return one row for each decision of search and scheduler: trial, step, action and reason."""
        from orchestrator.analysis.frames import decisions_frame

        return decisions_frame(self._data())

    def importances(self) -> "DataFrame":
        """Return one row for each searched field: its share of the importance and its effect, with intervals.

        The frame is empty if nothing can be said; `attrs["why_none"]` then says why.
        """
        from orchestrator.analysis.frames import importances_frame
        from orchestrator.analysis.importance import find_importances

        return importances_frame(find_importances(self._data()))

    def figure(self, name: str) -> "Figure":
        """Return a figure of the report: curves, rungs, parallel, importances, effects, timeline or machines.

        Raises:
            RequestError: there is no such figure, or nothing to draw in it.
        """
        from orchestrator.analysis.importance import find_importances
        from orchestrator.page.figures import draw

        data = self._data()
        return draw(name, data, find_importances(data))

    def ask(self, verb: "Verb", wait_s: float = 60.0, **fields: Any) -> str:
        """Ask the driver of a running sweep for something, and return its answer.

        Args:
            verb: stop, pause, go-on, extend, add or clone.
            wait_s: how long to wait for the answer, in seconds.
            fields: what belongs to it: `trial_id`, `values` (dotted field -> value), `warm`, `num_trials`, `budget`.

        Raises:
            RequestError: there is no such verb or field, a value does not fit, or the driver refuses it.
            RecordError: the sweep's folder cannot be written to.
        """
        from orchestrator.record.ask import ask

        return ask(self.record, verb, wait_s, **fields)

    def _data(self) -> "SweepData":
        from orchestrator.analysis.sweep_data import read_data

        return read_data(self.record)


def open_sweep(sweep: str | Path, output: str | Path = "runs") -> Sweep:
    """Open a sweep by its folder, by its URI, or by its name under `output`.

    Raises:
        RecordError: there is no such sweep, or its record cannot be read.
        RequestError: the URI is none of a supported store.
        RemoteError: the store refuses it, or does not answer.
    """
    return Sweep(view_sweep(sweep, output))


def run(
    spec: SweepSpec,
    name: str | None = None,
    output: str | Path | None = None,
    *,
    without_search: bool = False,
    address: str | None = None,
    warm_from: Sequence[str | Path] = (),
    watch: Watch = lambda _: None,
    say: Say = print,
) -> Sweep:
    """Run an experiment and return the finished sweep.

    Trials that fail do not raise: `Sweep.trials()` shows them with their states and errors.

    Args:
        spec: the experiment, from `load_spec`.
        name: the name of the sweep's folder; default `output.name` of the experiment, else "sweep" and the time.
        output: the parent folder of sweeps, or its URI; default `output.folder` of the experiment.
        without_search: run one trial with the experiment's own values in this process, without Ray.
        address: a Ray cluster, "auto" or "HOST:PORT"; default Ray is started on this machine.
        warm_from: folders or names of earlier sweeps, whose finished trials are evidence for the search.
        watch: called with all trials whenever one changes; not called with `without_search`.
        say: called with messages.

    Raises:
        RequestError: the request is wrong; nothing has been written.
        RecordError: a sweep of `warm_from` cannot be read.
        ClusterError: Ray cannot be reached, or its nodes do not share the output folder.
        SweepError: no trial of the sweep finished.
        TrialError: the trial failed; with `without_search` only.
        Interrupted: a signal ended the sweep; `resume` continues it.
        Signalled: the same with `without_search`; it is a KeyboardInterrupt.
        StorageError: the disk is full or fails; `resume` continues the sweep.
    """
    from orchestrator.remote.output import new_sweep

    if warm_from and without_search:
        raise RequestError("warm_from is evidence for a search, but without_search is true", "Leave one of them out.")
    earlier = [view_sweep(each, output or spec.output.folder) for each in warm_from]
    with new_sweep(spec, "sweep", name, None if output is None else str(output)) as paths:
        if without_search:
            from orchestrator.training.local import run_local_trial

            run_local_trial(spec, paths, _Follower(say))
        else:
            from orchestrator.sweep import run_sweep

            run_sweep(spec, paths, watch, address, say, warm_from=earlier)
    return open_sweep(paths.root)


def resume(
    sweep: str | Path,
    output: str | Path = "runs",
    *,
    num_trials: int | None = None,
    budget: Sequence[str] = (),
    address: str | None = None,
    trust_remote_code: bool = False,
    trust_state: bool = False,
    watch: Watch = lambda _: None,
    say: Say = print,
) -> Sweep:
    """Continue an interrupted sweep and return it. Finished trials do not run again.

    Args:
        sweep: the sweep's folder, its URI, or its name under `output`.
        output: the parent folder of sweeps.
        num_trials: a new total number of trials, larger than the present one.
        budget: new limits, such as `["gpu_hours=20"]`, for fields of `search.budget`.
        address: a Ray cluster, "auto" or "HOST:PORT"; default Ray is started on this machine.
        trust_remote_code: run Python code that comes with the base.
        trust_state: load the search's state whoever has signed it. It can run code.
        watch: called with all trials whenever one changes; not called for a sweep of one trial without search.
        say: called with messages.

    Raises:
        RecordError: there is no such sweep, its record cannot be read, or the search's state is not signed with the
            owner's key.
        RequestError: another process runs the sweep, it cannot have these trials or limits, or its base brings code
            that is not trusted.
        OrchestratorError: the errors that `run` raises.
    """
    from orchestrator.base_folder import require_trusted_code
    from orchestrator.record.extend import extend_sweep
    from orchestrator.remote.output import sweep_to_resume

    record: SweepRecord = extend_sweep(sweep_to_resume(sweep, output), num_trials, budget)
    require_trusted_code(record.info.spec.base, str(record.paths.root), trust_remote_code)
    if record.info.is_single_trial:
        from orchestrator.training.local import resume_local_trial

        resume_local_trial(record, _Follower(say))
    else:
        from orchestrator.sweep import resume_sweep

        resume_sweep(record, watch, address, say, trust_state=trust_state)
    return open_sweep(record.paths.root)


class _Follower:
    """A `Watcher` that passes messages on and never stops the trial."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def on_step(self, step: int, total_steps: int) -> bool:
        return True

    def on_report(self, point: MetricPoint) -> bool:
        values = ", ".join(f"{name} {value:.4g}" for name, value in point.values.items())
        self._say(f"step {point.step}: {values}")
        return True

    def say(self, sentence: str) -> None:
        self._say(sentence)
