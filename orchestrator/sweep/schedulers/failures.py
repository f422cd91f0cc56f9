"""Let the searcher learn from trials that fail by their own values."""

from typing import Any

from orchestrator.record import TrialPaths, read_result
from orchestrator.sweep.schedulers.brackets import Bohb


def report_failure(searcher: Any, rule: Any, trial: Any, paths: TrialPaths) -> None:
    """Report a trial that failed by its own values, such as a rate at which it diverged.

    A failure of the machines says nothing about the values. Tune itself reports no value of a failed trial.

    Args:
        searcher: learns from results.
        rule: the Tune scheduler that decides.
        trial: the Tune trial.
        paths: of the trial.
    """
    if not paths.result.is_file() or read_result(paths).failure in (None, "infrastructure"):
        return
    if isinstance(rule, Bohb):
        searcher.report_failure(trial.trial_id, rule.next_rung(trial))
    else:
        searcher.report_failure(trial.trial_id)
