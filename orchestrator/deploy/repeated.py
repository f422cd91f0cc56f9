"""Compare finalists that were trained with several seeds: the noise of rows and that of seeds both count."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from orchestrator.deploy.recommend import (
    CONFIDENCE,
    RESAMPLES,
    Candidate,
    ComparedCandidate,
    Mode,
    Recommendation,
    metric_columns,
    resampled_counts,
)

Runs = Mapping[str, Sequence[Candidate]]
"""Trial -> its finished runs: the trial itself, and the same values with other seeds."""


def recommend_repeated(
    finalists: Sequence[Candidate], runs: Runs, metric: str, mode: Mode, strict: bool, num_compared: int
) -> Recommendation:
    """Find the finalist with the best mean over its runs, and recommend the smallest one that is tied with it.

    Args:
        finalists: trials of which each has two runs or more, with scores of the same rows.
        runs: the runs of each.
        metric: metric to compare by.
        mode: whether lower or higher values are better.
        strict: recommend the one with the best mean, whichever are tied with it.
        num_compared: number of trials from which the finalists were chosen.
    """
    means = {each.trial.trial_id: fmean(_values(runs[each.trial.trial_id], metric)) for each in finalists}
    sign = 1 if mode == "min" else -1
    leader, *others = sorted(finalists, key=lambda each: sign * means[each.trial.trial_id])
    rivals = _compare(leader, others, runs, metric)
    tied = [leader, *(rival.candidate for rival in rivals if rival.is_tied)]
    recommended = leader if strict else min(tied, key=lambda each: each.cost)
    values = {each.trial.trial_id: _values(runs[each.trial.trial_id], metric) for each in (leader, *others)}
    return Recommendation(metric, mode, leader, rivals, recommended, num_compared, None, values)


def _compare(leader: Candidate, others: Sequence[Candidate], runs: Runs, metric: str) -> list[ComparedCandidate]:
    """Compare means over seeds with the leader's.

    A difference is drawn as the bootstrapped difference of the means over seeds, plus the error of the two means by
    their seeds: Student's t with the standard deviation between seeds, pooled over all finalists. (Bouthillier et al.,
    Accounting for Variance in Machine Learning Benchmarks, MLSys 2021, say why both sources count.)
    """
    import numpy as np

    names = [each.trial.trial_id for each in (leader, *others)]
    values = {name: np.array(_values(runs[name], metric)) for name in names}
    freedom = sum(len(each) - 1 for each in values.values())
    spread = float(np.sqrt(sum(((each - each.mean()) ** 2).sum() for each in values.values()) / freedom))
    draws = {name: _row_draws(runs[name], metric) for name in names}
    random, tail = np.random.default_rng(1), (1 - CONFIDENCE) / 2
    compared = []
    for name, other in zip(names[1:], others, strict=True):
        error = spread * np.sqrt(1 / len(values[name]) + 1 / len(values[names[0]]))
        drawn = draws[name] - draws[names[0]] + error * random.standard_t(freedom, RESAMPLES)
        low, high = np.quantile(drawn, (tail, 1 - tail))
        difference = float(values[name].mean() - values[names[0]].mean())
        compared.append(ComparedCandidate(other, difference, float(low), float(high)))
    return compared


def _row_draws(runs: Sequence[Candidate], metric: str) -> Any:
    """Return the mean of the metric over the runs, for each resample of the held-out rows; the same ones for all."""
    import numpy as np

    columns = [metric_columns(metric, each.scores) for each in runs if each.scores]
    stacked = np.array([each for each in columns if each is not None])  # (runs, 2, rows)
    parts = []
    for counts in resampled_counts(stacked.shape[2]):
        above, below = (stacked[:, part] @ counts.T for part in (0, 1))
        parts.append((above / below).mean(axis=0))
    return np.concatenate(parts)


def _values(runs: Sequence[Candidate], metric: str) -> list[float]:
    return [value for each in runs if (value := each.value(metric)) is not None]
