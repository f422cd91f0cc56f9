"""Whether a sweep ends itself (`search.stop`): what another trial promises, and how long the leader has stood."""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from orchestrator.adapters.bundle import read_scores
from orchestrator.deploy.recommend import Candidate, recommend
from orchestrator.errors import RecordError
from orchestrator.record import SearchEnded, SweepRecord, TrialResult, read_trial, write_record
from orchestrator.spec.search import SearchSection
from orchestrator.sweep.search.coordinates import Coordinate
from orchestrator.sweep.search.models import Forecast, propose
from orchestrator.sweep.search.space import Point


class Ends(Protocol):
    """Says whether a search draws no further trial, whenever a trial has ended."""

    def __call__(self, ended: Sequence[str], running: Collection[Point], has_failed: bool) -> bool:
        """Return whether no further trial is drawn.

        Args:
            ended: trials that have ended, in that order.
            running: points of the trials that were drawn and have not ended.
            has_failed: whether the last one has failed.
        """
        ...


class EndRule:
    """Decides by the records whether a sweep draws no further trial, and records why.

    A decision depends only on the arguments of `ends` and on the records of the trials that have ended. Which trials
    run is the search's own knowledge: the record of a trial may not be written yet, or may say that it has ended
    before the search hears of that, and a trial that was lost with an earlier driver has one too.
    """

    def __init__(self, record: SweepRecord) -> None:
        """Take a sweep, which may have ended itself under an earlier driver."""
        self._record = record
        self._spec, self._search = record.info.spec, record.info.spec.search

    def ends(self, ended: Sequence[str], running: Collection[Point], has_failed: bool) -> bool:
        """Return whether no further trial is drawn, and record the reason when that is found out. See `Ends`."""
        if self._record.search_ended() is not None:
            return True
        stop = self._search.stop
        if not stop.is_set or len(ended) < stop.min_trials:
            return False
        if has_failed and not self._record.paths.trial(ended[-1]).result.is_file():
            ended = ended[:-1]  # the machines have lost it; the driver writes its result after this
        trials = self._judged(ended)
        if len(trials) < stop.min_trials:
            return False
        found = self._unmoved(trials) or self._small_gain(trials, running)
        if found is not None:
            write_record(self._record.paths.search_ended, found)
        return found is not None

    def _small_gain(self, trials: Sequence[TrialResult], running: Collection[Point]) -> SearchEnded | None:
        """Return the end of the sweep, if another trial is expected to gain less than `search.stop.gain`."""
        share, measured = self._search.stop.gain, self._measured(trials)
        if share is None or len(measured) < 2:
            return None
        found = [(self._spec.point_of(trial.config), self._value(trial)) for trial in trials]
        results = [(point, value) for point, value in found if point is not None]  # added trials may lie outside
        if sum(math.isfinite(value) for _, value in results) < 2:
            return None
        gain = small_gain(self._search, results, [self._searched(point) for point in running])
        if gain is None:
            return None
        tokens = sum(trial.tokens for trial in measured) // len(measured)
        leader = min(measured, key=self._value)
        return self._ended(leader, len(trials), rule="gain", share=share, expected_gain=gain, tokens=tokens)

    def _unmoved(self, trials: Sequence[TrialResult]) -> SearchEnded | None:
        """Return the end of the sweep, if the last `search.stop.unmoved` trials have not moved the leader."""
        number = self._search.stop.unmoved
        before = [] if number is None else self._measured(trials[:-number])
        if not before:
            return None
        earlier, leader = min(before, key=self._value), min(self._measured(trials), key=self._value)
        if leader is not earlier and not self._are_tied(leader, earlier):
            return None
        return self._ended(leader, len(trials), rule="unmoved", unmoved=number)

    def _are_tied(self, leader: TrialResult, earlier: TrialResult) -> bool:
        """Return whether the held-out rows cannot tell two trials apart (paired bootstrap)."""
        try:
            pair = [Candidate(trial, read_scores(self._record.adapter_path(trial))) for trial in (leader, earlier)]
        except RecordError:  # damaged scores, which `best` reports; raised here, Tune would take them for a lost trial
            return False
        choice = recommend(pair, self._search.metric, self._search.resolved_mode)
        return any(rival.is_tied for rival in choice.rivals)

    @staticmethod
    def _measured(trials: Sequence[TrialResult]) -> list[TrialResult]:
        return [trial for trial in trials if trial.best is not None and trial.failure is None]

    def _judged(self, ended: Sequence[str]) -> list[TrialResult]:
        """Return the ended trials that say something about their values, in the order of their ends."""
        folders = [self._record.paths.trial(name) for name in ended]
        trials = [read_trial(folder, self._record.info) for folder in folders if folder.config.is_file()]
        return [
            trial
            for trial in trials
            if trial.failure != "infrastructure"
            and trial.stopped_by is None
            and (trial.best is not None or trial.failure is not None)
        ]

    def _searched(self, values: Mapping[str, Any]) -> Point:
        return {path: value for path, value in values.items() if path in self._search.space}

    def _value(self, trial: TrialResult) -> float:
        """Return a trial's best value, where lower is better; infinity if it failed by its values."""
        if trial.best is None or trial.failure is not None:
            return math.inf
        return trial.best.value if self._search.resolved_mode == "min" else -trial.best.value

    def _ended(self, leader: TrialResult, num_ended: int, **fields: Any) -> SearchEnded:
        assert leader.best is not None
        return SearchEnded(
            leader=leader.trial_id, num_ended=num_ended, metric=leader.metric, best=leader.best.value, **fields
        )


def small_gain(search: SearchSection, results: Sequence[tuple[Point, float]], running: Sequence[Point]) -> float | None:
    """Return what another trial is expected to gain, if that is less than `search.stop.gain` of the best value.

    The model must say so before and after the last result: a single one may change its mind.

    Args:
        search: the search section; its space has no `when`.
        results: points and their values in the order of their ends, two or more; lower is better, infinite for a trial
            that failed by its values.
        running: points of trials that have not ended.

    Returns:
        The gain in the unit of the values; None if it is not less, or if the model cannot say it.
    """
    least = (search.stop.gain or 0.0) * abs(min(value for _, value in results))
    last = forecast_next(search, results, running)
    if last is None or last.gain >= least:
        return None
    before = forecast_next(search, results[:-1], [*running, results[-1][0]])
    return None if before is None or before.gain >= least else last.gain


def forecast_next(
    search: SearchSection, finished: Sequence[tuple[Point, float]], running: Sequence[Point]
) -> Forecast | None:
    """Return what the best-placed further trial is expected to reach, by a Gaussian process on the results so far.

    Its gain bounds that of any other trial. None where the model cannot say it.

    Args:
        search: the search section; its space has no `when`.
        finished: points and their values; lower is better, infinite for a trial that failed by its values.
        running: points of trials that have not ended.
    """
    coordinates = {path: Coordinate.of(axis) for path, axis in search.space.items()}

    def drawn(point: Point) -> dict[str, Any]:
        return {path: coordinates[path].encode(value) for path, value in point.items()}

    return propose(
        {path: each.distribution() for path, each in coordinates.items()},
        [(drawn(point), value) for point, value in finished],
        [drawn(point) for point in running],
        prior=drawn({path: search.written_prior.get(path, each.middle()) for path, each in coordinates.items()}),
        prior_weight=0.0,
        has_conditions=False,
        seed=random.Random(f"{search.seed} end {len(finished)}").randrange(2**31),
    ).forecast
