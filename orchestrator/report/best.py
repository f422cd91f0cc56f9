"""Print the recommended adapter and the reason for it."""

from statistics import fmean

from rich.console import Console

from orchestrator.adapters.bundle import has_manifest
from orchestrator.deploy import ChosenTrial
from orchestrator.deploy.recommend import CONFIDENCE, Candidate, Recommendation, mean_interval
from orchestrator.record import TestScore, find_damage
from orchestrator.report.tables import duration
from orchestrator.spec.sections.evaluation import STDERR
from orchestrator.words import counted

_MOST_NAMED = 6


def say_best(console: Console, best: ChosenTrial) -> None:
    """Print the leader, the trials that cannot be distinguished from it, and the recommended trial."""
    choice = best.recommendation
    metric, leader, tied = choice.metric, choice.leader, choice.tied
    point = leader.trial.best
    assert point is not None
    failed = f" ({counted(best.num_failed, 'other')} failed)" if best.num_failed else ""
    lines = [
        f"best of {choice.num_compared}{failed}: {leader.trial.trial_id}, {_value(leader, metric)} "
        f"at step {point.step}{_size(leader)}"
    ]
    left_out = choice.num_compared - 1 - len(choice.rivals)
    if left_out and not choice.why_not_compared:
        lines.append(f"not compared row by row, because there are no scores of the same rows: {left_out} of them")
    if choice.why_not_compared and choice.num_compared > 1:
        lines.append(f"not compared with the others row by row: {choice.why_not_compared}")
    if choice.over_seeds:
        lines += _over_seeds(choice)
    if tied:
        named = [f"{each.candidate.trial.trial_id} ({each.difference:+.2g})" for each in tied[:_MOST_NAMED]]
        more = [f"{len(tied) - _MOST_NAMED} more"] if len(tied) > _MOST_NAMED else []
        on = "the held-out rows and seeds" if choice.over_seeds else "the held-out rows"
        lines.append(
            f"no significant difference to {', '.join(named + more)} on {on} (paired bootstrap, {CONFIDENCE:.0%})"
        )
    if choice.recommended is not leader:
        value = _value(choice.recommended, metric)
        lines.append(f"recommended: {best.trial.trial_id}, the smallest of them, {value}{_size(choice.recommended)}")
    lines += [f"left out, because its adapter is damaged: {trial}: {fault}" for trial, fault in best.damaged.items()]
    lines += [f"damaged: {damage}" for damage in find_damage(best.record)]
    if not has_manifest(best.adapter):
        lines.append("the adapter is unverified: it has no manifest.json, by which its files could be checked")
    lines += [best.trial.base_size] if best.trial.base_size else []
    if tokens := best.trial.generated_tokens:
        lines.append(f"its answers for evaluation.metrics: {tokens:,} tokens in {duration(best.trial.generation_s)}")
    if (test := best.test_score) is not None:
        lines += _on_test_rows(test)
    lines.append(f"adapter: {best.adapter}")
    console.print("\n".join(lines), soft_wrap=True, highlight=False)


def _over_seeds(choice: Recommendation) -> list[str]:
    """Return a line for each finalist: its mean over seeds, their range, and its distance from the leader."""
    intervals = {
        rival.candidate.trial.trial_id: f", {rival.difference:+.2g} ({rival.low:+.2g} to {rival.high:+.2g})"
        for rival in choice.rivals
    }
    return [
        f"over {len(values)} seeds: {name}, mean {fmean(values):.6g} ({min(values):.6g} to {max(values):.6g})"
        f"{intervals.get(name, '')}"
        for name, values in choice.over_seeds.items()
    ]


def _on_test_rows(test: TestScore) -> list[str]:
    scores, (low, high) = test.scores, mean_interval(test.scores)
    return [
        f"on {len(scores.losses)} test rows, which no decision has seen: {test.trial_id}, loss {scores.loss:.6g} "
        f"({CONFIDENCE:.0%}: {low:.6g} to {high:.6g}), token accuracy {scores.token_accuracy:.4g}",
        f"  on the held-out rows it has loss {test.held_out['eval/loss']:.6g}: the test rows add {test.optimism:+.2g}",
    ]


def _value(candidate: Candidate, metric: str) -> str:
    """Return the value of a metric, with its standard error over the rows if that is recorded."""
    error = candidate.value(f"{metric}{STDERR}")
    return f"{metric} {candidate.value(metric):.6g}" + ("" if error is None else f" +- {error:.2g}")


def _size(candidate: Candidate) -> str:
    return f", {candidate.trial.num_parameters:,} parameters" if candidate.trial.num_parameters else ""
