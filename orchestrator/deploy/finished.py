"""Finished sweeps: rank their trials, and choose the adapter to take."""

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.adapters.bundle import has_manifest, read_scores, verify_adapter
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.load import load_model_and_tokenizer
from orchestrator.deploy.recommend import (
    SIZE,
    Candidate,
    Mode,
    Recommendation,
    pareto,
    rank,
    recommend,
    why_it_may_differ,
)
from orchestrator.deploy.repeated import recommend_repeated
from orchestrator.errors import RecordError
from orchestrator.record import SweepPaths, SweepRecord, TestScore, TrialResult, TrialState, find_damage, read_sweep
from orchestrator.record.absent import AbsentError
from orchestrator.record.pulled import NotPulledError
from orchestrator.remote.view import view_sweep
from orchestrator.spec.search import BETTER_END, SEED
from orchestrator.words import counted

_MOST_NAMED = 3
"""Most damaged adapters that a message describes."""


@dataclass(frozen=True)
class ChosenTrial:
    """The trial that a sweep recommends, and its adapter folder."""

    record: SweepRecord
    trial: TrialResult
    adapter: Path
    recommendation: Recommendation
    """The comparison that it was chosen by."""
    damaged: dict[str, str]
    """Trials that were left out because their adapter is damaged: trial id -> what is wrong."""
    in_doubt: dict[str, str]
    """Damaged trials that might have been chosen instead: trial id -> why."""

    @property
    def test_score(self) -> TestScore | None:
        """The scores of this adapter on the test rows, if the sweep has measured them."""
        score, point = self.record.test_score(), self.trial.best
        is_of_it = (
            score is not None
            and point is not None
            and (score.trial_id, score.step) == (self.trial.trial_id, point.step)
        )
        return score if is_of_it else None

    @cached_property
    def num_failed(self) -> int:
        """Number of the sweep's trials that have failed."""
        return sum(trial.state == TrialState.FAILED for trial in self.record.trials())

    def adapter_ref(self) -> AdapterRef:
        """Refer to the adapter.

        Raises:
            RecordError: the adapter is incomplete or changed; or a damaged adapter might have been chosen instead,
                so that the user has to decide.
        """
        if self.in_doubt:
            trial_id, why = next(iter(self.in_doubt.items()))
            raise RecordError(
                f"the adapter of trial {trial_id} is damaged, and the choice may depend on it: {why}: "
                f"{self.damaged[trial_id]}",
                f"Repair it; or give the folder of the best undamaged adapter: {self.adapter}",
            )
        return AdapterRef.of_trial(self.record, self.trial)

    def load(self, trust_remote_code: bool = False) -> tuple[Any, Any]:
        """Load the adapter on its base: a `PeftModel` in evaluation mode, and its tokenizer.

        Args:
            trust_remote_code: run Python code that comes with the base.

        Raises:
            RecordError: the adapter is incomplete or changed, or the choice is in doubt.
            RequestError: its base cannot be loaded, or brings code, and code is not trusted.
        """
        return load_model_and_tokenizer(self.adapter_ref().trusted(trust_remote_code))

    def as_dict(self) -> dict[str, Any]:
        """Return which adapter was chosen and why, as plain JSON values; the keys of `config` are dotted fields."""
        trial, best = self.trial, self.trial.best
        assert best is not None
        return {
            "sweep": self.record.paths.name,
            "trial_id": trial.trial_id,
            "state": trial.state,
            "metric": self.recommendation.metric,
            "mode": self.recommendation.mode,
            "value": self.recommendation.recommended.value(self.recommendation.metric),
            "step": best.step,
            "values": best.values,
            "num_parameters": trial.num_parameters,
            "num_compared": self.recommendation.num_compared,
            "num_failed": self.num_failed,
            "choice": self.recommendation.as_dict(),
            "test": self.test_score and self.test_score.scores.values(),
            "damaged": self.damaged,
            "damaged_records": [str(damage) for damage in find_damage(self.record)],
            "is_verified": has_manifest(self.adapter),
            "config": trial.config.dotted(),
            "varied": trial.config.varied,
            "adapter": str(self.adapter),
            "base": trial.config.base.model,
            "base_gib": trial.base_gib,
            "base_quantized_share": trial.base_quantized_share,
            "data_fingerprint": trial.data_fingerprint,
        }


@dataclass(frozen=True)
class FinishedSweep:
    """A sweep and its results.

    `best`, `top` and `pareto` raise RecordError if no trial has finished with an adapter.
    """

    record: SweepRecord
    uses_repeats: bool = True
    """Whether `best` compares finalists that were run again (`search.repeats`) over their seeds."""

    def best(self, metric: str | None = None, strict: bool = False) -> ChosenTrial:
        """Choose the smallest adapter among the finished trials that are tied with the best one.

        Finished trials are COMPLETE or STOPPED. Every byte of the chosen adapter is checked. Trials with a damaged
        adapter are left out and listed in `ChosenTrial.damaged`.

        Args:
            metric: metric to choose by, at each trial's best evaluation; default the search metric.
            strict: choose the best value, however small its lead.

        Raises:
            AbsentError: `orchestrator clean` has removed the adapter that this metric chooses.
            NotPulledError: the adapter was left out when the sweep was pulled.
            RecordError: no finished trial has an undamaged adapter.
            RequestError: no finished trial has this metric.
        """
        metric = self._metric(metric)
        mode, damaged, whole = self._mode(metric), dict[str, str](), list[Candidate]()
        ranked = rank(self._candidates, metric, mode)
        for each in ranked:
            try:
                whole.append(Candidate(each.trial, read_scores(self.record.adapter_path(each.trial))))
            except RecordError as error:
                damaged[each.trial.trial_id] = error.message
        while whole:
            recommendation = self._recommend(whole, metric, mode, strict)
            trial = recommendation.recommended.trial
            try:
                adapter = self.record.adapter(trial)
                verify_adapter(adapter)
            except (AbsentError, NotPulledError):
                raise  # the next one is not what the rows say
            except RecordError as error:
                damaged[trial.trial_id] = error.message
                whole.remove(recommendation.recommended)
            else:
                lost = [each for each in ranked if each.trial.trial_id in damaged]
                doubts = {each.trial.trial_id: why_it_may_differ(recommendation, each, ranked, strict) for each in lost}
                in_doubt = {trial_id: why for trial_id, why in doubts.items() if why}
                return ChosenTrial(self.record, trial, adapter, recommendation, damaged, in_doubt)
        faults = [*damaged.values()][:_MOST_NAMED]
        if len(damaged) > len(faults):
            faults.append(f"and {counted(len(damaged) - len(faults), 'more adapter')}")
        raise RecordError(
            f"{self.record.paths.root}: no finished trial with {metric} has an undamaged adapter:\n  "
            + "\n  ".join(faults)
        )

    def _recommend(self, whole: list[Candidate], metric: str, mode: Mode, strict: bool) -> Recommendation:
        """Compare trials by their held-out rows; finalists that were run again by their means over seeds too."""
        by_rows = recommend(whole, metric, mode, strict)
        if by_rows.why_not_compared:
            return by_rows
        again = self._repeats
        runs = {each.trial.trial_id: [each, *again[key]] for each in whole if (key := point_of(each.trial)) in again}
        finalists = [each for each in whole if each.trial.trial_id in runs and each.scores]
        if len(finalists) < 2:
            return by_rows
        return recommend_repeated(finalists, runs, metric, mode, strict, by_rows.num_compared)

    @cached_property
    def _repeats(self) -> dict[str, list[Candidate]]:
        """Finished runs of the finalists with other seeds, by their point."""
        paths = SweepPaths(self.record.paths.repeats)
        if not (self.uses_repeats and paths.sweep.is_file()):
            return {}
        record, found = read_sweep(paths.root), dict[str, list[Candidate]]()
        for trial in record.finished():
            scores = None
            with suppress(RecordError):  # a run with damaged scores does not count
                scores = read_scores(record.adapter_path(trial))
            if scores is not None:
                found.setdefault(point_of(trial), []).append(Candidate(trial, scores))
        return found

    def top(self, number: int, metric: str | None = None) -> list[TrialResult]:
        """Return the best `number` finished trials by value, best first."""
        metric = self._metric(metric)
        return [each.trial for each in rank(self._candidates, metric, self._mode(metric))[:number]]

    def pareto(self, metrics: list[str]) -> list[TrialResult]:
        """Return the Pareto set of the finished trials by these metrics (`size`: parameters of the adapter)."""
        names = [self._metric(name) for name in metrics]
        return [each.trial for each in pareto(self._candidates, {name: self._mode(name) for name in names})]

    def _metric(self, written: str | None) -> str:
        """Return the name of a metric, which may be written as tables head it: `exact_match` for `eval/exact_match`."""
        if written is None:
            return self.record.info.spec.search.metric
        known = {name for each in self._candidates if each.trial.best for name in each.trial.best.values}
        whole = f"eval/{written}"
        return whole if written not in known and whole in known else written

    def _mode(self, metric: str) -> Mode:
        search = self.record.info.spec.search
        if metric == search.metric:
            return search.resolved_mode
        return "min" if metric == SIZE else BETTER_END.get(metric, "max")

    @cached_property
    def _candidates(self) -> list[Candidate]:
        """Return all finished trials, without reading their adapter files."""
        root, finished = self.record.paths.root, self.record.finished()
        if not finished:
            raise RecordError(
                f"{root}: no trial has finished with an evaluation yet",
                f"`orchestrator status {root}` shows where the trials are.",
            )
        return [Candidate(trial, scores=None) for trial in finished]


def point_of(trial: TrialResult) -> str:
    """Return the values of a trial but its seed, for comparison."""
    return repr(sorted((path, value) for path, value in trial.config.varied.items() if path != SEED))


def open_sweep(sweep: str | Path, output: str | Path = "runs") -> FinishedSweep:
    """Open a sweep by its folder, by its URI, or by its name under `output`.

    Raises:
        RecordError: there is no such sweep, or its record cannot be read.
        RequestError: the URI is none of a supported store.
        RemoteError: the store refuses it, or does not answer.
    """
    return FinishedSweep(view_sweep(sweep, output))
