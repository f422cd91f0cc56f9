"""A sweep as those see it who want its adapter."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.adapters.bundle import read_scores, verify_adapter
from orchestrator.deploy.choice import SIZE, Candidate, Mode, Recommendation, choose, pareto, rank, why_it_may_differ
from orchestrator.errors import RecordError
from orchestrator.record import SweepRecord, TrialResult, read_sweep


@dataclass(frozen=True)
class ChosenTrial:
    """A trial that was chosen, and where its adapter lies."""

    record: SweepRecord
    trial: TrialResult
    adapter: Path
    choice: Recommendation
    """What it was chosen from."""
    damaged: dict[str, str]
    """Trial -> what is wrong with its adapter, of those that were left out for it."""
    in_doubt: dict[str, str]
    """Trial -> why it may have been chosen, of those that are damaged."""

    def load(self) -> tuple[Any, Any]:
        """The adapter on its base, a `PeftModel` in evaluation mode, and its tokenizer; see `load_adapter`."""
        from orchestrator.deploy.adapter_ref import AdapterRef
        from orchestrator.deploy.load import load_adapter

        return load_adapter(AdapterRef.of_best(self))

    def as_dict(self) -> dict[str, Any]:
        """The answer to "which adapter, and why", as plain JSON values; `config` has dotted fields."""
        trial, best = self.trial, self.trial.best
        assert best is not None
        return {
            "sweep": self.record.paths.name,
            "trial_id": trial.trial_id,
            "state": trial.state,
            "metric": self.choice.metric,
            "mode": self.choice.mode,
            "value": self.choice.recommended.value(self.choice.metric),
            "step": best.step,
            "values": best.values,
            "num_parameters": trial.num_parameters,
            "num_compared": self.choice.num_compared,
            "choice": self.choice.as_dict(),
            "damaged": self.damaged,
            "config": trial.config.dotted(),
            "varied": trial.config.varied,
            "adapter": str(self.adapter),
            "base": trial.config.base.model,
            "data_fingerprint": trial.data_fingerprint,
        }


@dataclass(frozen=True)
class FinishedSweep:
    """A sweep and what came of it. The methods raise RecordError where no trial has finished with an adapter."""

    record: SweepRecord

    def trials(self) -> list[TrialResult]:
        """All trials, best first; those without an evaluation last."""
        return self.record.trials()

    def best(self, metric: str | None = None, strict: bool = False) -> ChosenTrial:
        """Of the finished trials (COMPLETE or STOPPED) that cannot be told apart from the best, the smallest adapter.

        Every byte of it is checked: one that is damaged is left out, which `ChosenTrial.damaged` tells.

        Args:
            metric: to choose by, at each trial's best evaluation; default the one that was searched for.
            strict: the best value, however small its lead.
        """
        metric = metric or self.record.info.spec.search.metric
        mode, damaged, whole = self._mode(metric), dict[str, str](), list[Candidate]()
        ranked = rank(self._candidates, metric, mode)
        for each in ranked:
            try:
                whole.append(Candidate(each.trial, read_scores(self.record.adapter_path(each.trial))))
            except RecordError as error:
                damaged[each.trial.trial_id] = error.message
        while whole:
            choice = choose(whole, metric, mode, strict)
            trial = choice.recommended.trial
            try:
                adapter = self.record.adapter(trial)
                verify_adapter(adapter)
            except RecordError as error:
                damaged[trial.trial_id] = error.message
                whole.remove(choice.recommended)
            else:
                lost = [each for each in ranked if each.trial.trial_id in damaged]
                doubts = {each.trial.trial_id: why_it_may_differ(choice, each, ranked, strict) for each in lost}
                in_doubt = {trial_id: why for trial_id, why in doubts.items() if why}
                return ChosenTrial(self.record, trial, adapter, choice, damaged, in_doubt)
        faults = "\n  ".join(damaged.values())
        raise RecordError(f"{self.record.paths.root}: no finished trial with {metric} has a whole adapter:\n  {faults}")

    def top(self, number: int, metric: str | None = None) -> list[TrialResult]:
        """The best finished trials by their values, best first."""
        metric = metric or self.record.info.spec.search.metric
        return [each.trial for each in rank(self._candidates, metric, self._mode(metric))[:number]]

    def pareto(self, metrics: list[str]) -> list[TrialResult]:
        """Finished trials that no other one beats in all of these (`size` counts the adapter's parameters)."""
        return [each.trial for each in pareto(self._candidates, {name: self._mode(name) for name in metrics})]

    def _mode(self, metric: str) -> Mode:
        search = self.record.info.spec.search
        if metric == search.metric:
            return search.resolved_mode
        return "min" if metric in ("eval/loss", SIZE) else "max"

    @cached_property
    def _candidates(self) -> list[Candidate]:
        """All finished trials, their files not looked at."""
        root, finished = self.record.paths.root, self.record.finished()
        if not finished:
            raise RecordError(
                f"{root}: no trial has finished with an evaluation yet",
                f"`orchestrator status {root}` shows where the trials are.",
            )
        return [Candidate(trial, scores=None) for trial in finished]


def open_sweep(sweep: str | Path, output: str | Path = "runs") -> FinishedSweep:
    """Open a sweep by its folder, or by its name under `output`.

    Raises:
        RecordError: there is no such sweep, or its record cannot be read.
    """
    return FinishedSweep(read_sweep(sweep, output))
