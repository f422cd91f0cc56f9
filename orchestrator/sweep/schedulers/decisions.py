"""The log of decisions, and its sentences: by which rule a trial was stopped or cloned."""

from typing import Any, assert_never

from orchestrator.record import Decision, SweepPaths
from orchestrator.record.decisions import append_decision, keep_decisions
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections.scheduler import (
    AshaScheduler,
    BohbScheduler,
    ForecastScheduler,
    HyperBandScheduler,
    MedianScheduler,
    NoScheduler,
    Pb2Scheduler,
    PbtScheduler,
    Population,
)
from orchestrator.sweep.schedulers.population import Clone


class DecisionLog:
    """Writes `decisions.jsonl`, and knows why trials were stopped."""

    def __init__(self, paths: SweepPaths) -> None:
        """
        Args:
            paths: of the sweep.
        """
        self.number = 0
        """Number of decisions in the log."""
        self.stop_reasons: dict[str, str] = {}
        """Stopped trial -> why."""
        self._paths = paths

    def add(self, decision: Decision) -> None:
        """Append a decision."""
        if decision.action == "stopped":
            self.stop_reasons[decision.trial_id] = decision.why
        append_decision(self._paths, decision)
        self.number += 1

    def keep(self, number: int) -> None:
        """Go back to the first `number` decisions; a killed driver has made the others, which are made again."""
        self.number = number
        keep_decisions(self._paths, number)


def why_chosen(controller: Any, trial: Any) -> str | None:
    """Return the search's reason for a trial's values; None where the search gives none."""
    explain = getattr(controller.search_alg, "why_chosen", None)
    return explain(trial.trial_id) if explain else None


def why_stopped(spec: SweepSpec, result: dict[str, Any]) -> str:
    """Name the rule by which a trial was stopped, with its last report."""
    scheduler, metric = spec.scheduler, spec.search.metric
    report = f"{scheduler.kind}: {metric} {result[metric]:.6g} at step {result['step']}"
    match scheduler:
        case HyperBandScheduler() | BohbScheduler():
            return f"{report} is not among the best 1 in {scheduler.reduction_factor} of its bracket"
        case AshaScheduler() | MedianScheduler() | ForecastScheduler():  # these say why as they decide
            return f"{report} was the last report"
        case NoScheduler() | PbtScheduler() | Pb2Scheduler():  # these stop no trial by themselves
            return f"{report} was the last report"
        case _:
            assert_never(scheduler)


def why_cloned(spec: SweepSpec, result: dict[str, Any], clone: Clone) -> str:
    """Name the rule by which a trial takes over the state of another, with its last report."""
    assert isinstance(spec.scheduler, Population)
    kind, share, metric = spec.scheduler.kind, spec.scheduler.quantile, spec.search.metric
    return (
        f"{kind}: {metric} {result[metric]:.6g} at step {result['step']} is among the worst {share:.0%} of the trials, "
        f"that of {clone.donor} among the best: from its step {clone.step} on with "
        + ", ".join(f"{path} {value:.6g}" for path, value in clone.values.items())
    )
