"""Print what an audit has found."""

from rich.console import Console

from orchestrator.deploy.recommend import CONFIDENCE
from orchestrator.report.tables import duration
from orchestrator.sweep.audit import Audit, AuditedTrial
from orchestrator.words import counted


def say_audit(console: Console, audit: Audit) -> None:
    """Print a line for each audited trial, how many would have won, and what stopping has saved."""
    lines = [_line(audit, trial) for trial in audit.trials]
    low, high = audit.interval
    sampled = len(audit.trials)
    share = f", {audit.regret / abs(audit.best):.2%} of it" if audit.best else ""
    missed = f"; the largest missed gain is {audit.regret:.3g} {audit.metric}{share}" if audit.num_won else ""
    lines.append(
        f"{audit.num_won} of {counted(sampled, 'stopped trial')} would have won, ended as planned: the best of the "
        f"sweep is {audit.metric} {audit.best:.6g} ({audit.leader}){missed}"
    )
    lines.append(
        f"of all {counted(audit.num_stopped, 'trial')} that {audit.scheduler} has stopped, {_between(low, high)} would "
        f"have won ({CONFIDENCE:.0%}; a random sample of {sampled}, seed {audit.seed})"
        if sampled < audit.num_stopped
        else f"these are all trials that {audit.scheduler} has stopped"
    )
    saving = audit.saving
    time = (
        f"{duration(saving.gpu_seconds)} of GPU time" if saving.gpu_seconds else f"{duration(saving.seconds)} of work"
    )
    lines.append(
        f"stopping saved about {saving.tokens:,} tokens, {saving.share_of_tokens:.0%} of all that were planned, "
        f"and {time}"
    )
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def _line(audit: Audit, trial: AuditedTrial) -> str:
    at = "" if trial.stopped_value is None else f" at {trial.stopped_value:.6g}"
    stopped = f"{trial.trial_id}: stopped at step {trial.stopped_at}{at}"
    if trial.value is None:
        return f"{stopped}; it would have failed"
    would = "would have won" if trial.would_have_won else "would not have won"
    apart = f" (until the stop within {trial.difference:.2g})" if trial.difference else ""
    return f"{stopped}; ends at {audit.metric} {trial.value:.6g}{apart}: {would}"


def _between(low: int, high: int) -> str:
    return str(low) if low == high else f"between {low} and {high}"
