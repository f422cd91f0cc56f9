"""Recommend an adapter: find the best one, the ones statistically tied with it, and the smallest of these."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.errors import RequestError
from orchestrator.record import RowScores, TrialResult

Mode = Literal["min", "max"]

SIZE = "size"
"""An objective besides the metrics: the number of parameters of the adapter; smaller is better."""

RESAMPLES = 2000
CONFIDENCE = 0.95
MIN_ROWS = 10
"""With fewer rows, the bootstrap is not meaningful."""
_MAX_COUNTS = 1 << 24
"""Resampled row counts that are in memory at the same time."""


@dataclass(frozen=True)
class Candidate:
    """A finished trial at its best evaluation."""

    trial: TrialResult
    scores: RowScores | None
    """Scores of the held-out rows; None if the adapter folder does not contain them."""

    def value(self, metric: str) -> float | None:
        """Return the value of a metric or of `SIZE`; None if it was not measured."""
        if metric == SIZE:
            return self.trial.num_parameters
        return self.trial.best.values.get(metric) if self.trial.best else None

    @property
    def cost(self) -> float:
        """Number of parameters of its adapter; infinite if unknown. Of tied candidates the cheapest is recommended."""
        return self.trial.num_parameters or float("inf")


@dataclass(frozen=True)
class ComparedCandidate:
    """A candidate compared with the leader."""

    candidate: Candidate
    difference: float
    """The candidate's value minus the leader's."""
    low: float
    high: float
    """Bounds of the bootstrap confidence interval of the difference."""

    @property
    def is_tied(self) -> bool:
        """Whether the interval contains zero: the rows do not show which of the two is better."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Recommendation:
    """The comparison of all candidates, and the recommended one."""

    metric: str
    mode: Mode
    leader: Candidate
    rivals: list[ComparedCandidate]
    """All other candidates with comparable row scores, best first."""
    recommended: Candidate
    num_compared: int
    """Number of candidates, including the leader."""
    why_not_compared: str | None
    """Why no candidate could be compared with the leader row by row; None if they were compared."""
    over_seeds: dict[str, list[float]] = field(default_factory=dict)
    """Finalist -> values of its runs with different seeds, if finalists were run again (`search.repeats`). The rivals
    are then the other finalists, and differences those of means over seeds."""

    @property
    def tied(self) -> list[ComparedCandidate]:
        """The rivals that are tied with the leader, best first."""
        return [rival for rival in self.rivals if rival.is_tied]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values."""
        return {
            "leader": self.leader.trial.trial_id,
            "recommended": self.recommended.trial.trial_id,
            "tied": [
                {
                    "trial_id": rival.candidate.trial.trial_id,
                    "value": rival.candidate.value(self.metric),
                    "difference": rival.difference,
                    "interval": [rival.low, rival.high],
                    "num_parameters": rival.candidate.trial.num_parameters,
                }
                for rival in self.tied
            ],
            "confidence": CONFIDENCE,
            "over_seeds": self.over_seeds,
            "why_not_compared": self.why_not_compared,
        }


def recommend(candidates: Sequence[Candidate], metric: str, mode: Mode, strict: bool = False) -> Recommendation:
    """Find the leader by `metric`, and recommend the tied candidate with the fewest parameters.

    Two candidates are compared by a paired bootstrap (Efron and Tibshirani 1993; Koehn 2004 for paired rows). Held-out
    rows are drawn with replacement, the same rows for both, and the metric of each candidate is recomputed. The two
    are tied if zero lies within the central `CONFIDENCE` interval of the differences.

    Args:
        candidates: at least one.
        metric: metric to compare by.
        mode: whether lower or higher values are better.
        strict: recommend the leader, whichever candidates are tied with it.

    Raises:
        RequestError: no candidate has this metric.
    """
    ranked = rank(candidates, metric, mode)
    leader = ranked[0]
    why = _why_not_compared(leader, metric)
    rivals = [] if why or len(ranked) == 1 else _compare(leader, ranked[1:], metric)
    tied = [leader, *(rival.candidate for rival in rivals if rival.is_tied)]
    cheapest = min(tied, key=lambda each: each.cost)
    return Recommendation(metric, mode, leader, rivals, leader if strict else cheapest, len(ranked), why)


def rank(candidates: Sequence[Candidate], metric: str, mode: Mode) -> list[Candidate]:
    """Sort the candidates that have the metric, best first.

    Raises:
        RequestError: no candidate has it.
    """
    measured = [each for each in candidates if each.value(metric) is not None]
    if not measured:
        known = sorted({name for each in candidates if each.trial.best for name in each.trial.best.values} | {SIZE})
        raise RequestError(f"--metric {metric}: no finished trial has it", f"Choose one of: {', '.join(known)}.")
    sign = 1 if mode == "min" else -1
    return sorted(measured, key=lambda each: sign * (each.value(metric) or 0.0))


def why_it_may_differ(
    recommendation: Recommendation, lost: Candidate, ranked: Sequence[Candidate], strict: bool
) -> str | None:
    """Explain why the recommendation might differ if a damaged candidate had been included; None if it could not.

    Args:
        recommendation: the recommendation made without the candidate.
        lost: the candidate whose adapter, and so its row scores, are damaged.
        ranked: all candidates including this one, sorted by `rank`.
        strict: whether the recommendation was strict.
    """
    places = {each.trial.trial_id: place for place, each in enumerate(ranked)}
    place, recommended = places[lost.trial.trial_id], recommendation.recommended
    if place < places[recommendation.leader.trial.trial_id]:
        return "it has the best value"
    is_dearer = (lost.cost, place) > (recommended.cost, places[recommended.trial.trial_id])
    if strict or recommendation.why_not_compared or is_dearer:
        return None
    return "it is no larger, and its damage hides whether it is tied with the best (`best --strict` ignores ties)"


def pareto(candidates: Sequence[Candidate], objectives: dict[str, Mode]) -> list[Candidate]:
    """Return the Pareto set, sorted by the first objective, best first. Candidates without a value are left out."""
    first, mode = next(iter(objectives.items()))
    complete = [
        each for each in rank(candidates, first, mode) if all(each.value(name) is not None for name in objectives)
    ]

    def costs(candidate: Candidate) -> list[float]:
        signs = [1 if mode == "min" else -1 for mode in objectives.values()]
        return [sign * (candidate.value(name) or 0.0) for sign, name in zip(signs, objectives, strict=True)]

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [each for each in complete if not any(beats(costs(other), costs(each)) for other in complete)]


def metric_columns(metric: str, scores: RowScores) -> tuple[list[float], list[float]] | None:
    """Return numerators and denominators, per row, of a metric; None if row scores do not contain the metric."""
    if metric == "eval/loss":
        return scores.losses, [float(each) for each in scores.tokens]
    if metric == "eval/token_accuracy":
        return [float(each) for each in scores.hits], [float(each) for each in scores.tokens]
    rows = scores.metrics.get(metric.removeprefix("eval/"))
    return (rows, [1.0] * len(rows)) if rows else None


def _why_not_compared(leader: Candidate, metric: str) -> str | None:
    if metric == SIZE:
        return "sizes are exact"
    if leader.scores is None:
        return "its adapter folder has no scores of single rows"
    found = metric_columns(metric, leader.scores)
    if found is None:
        return f"{metric} was not recorded per row"
    return None if len(found[0]) >= MIN_ROWS else f"{len(found[0])} held-out rows are too few to compare"


def mean_interval(scores: RowScores) -> tuple[float, float]:
    """Return the bounds of the bootstrap `CONFIDENCE` interval of the mean loss over these rows."""
    import numpy as np

    losses, tokens = np.array(scores.losses), np.array(scores.tokens)
    drawn = np.concatenate([counts @ losses / (counts @ tokens) for counts in resampled_counts(len(losses))])
    low, high = np.quantile(drawn, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def resampled_counts(rows: int) -> Iterator[Any]:
    """Yield the `RESAMPLES` draws of rows in blocks: how often each row was drawn, (draws of the block, rows)."""
    import numpy as np

    random, each_block = np.random.default_rng(0), max(1, _MAX_COUNTS // rows)
    for start in range(0, RESAMPLES, each_block):
        yield random.multinomial(rows, np.full(rows, 1 / rows), size=min(each_block, RESAMPLES - start))


def _compare(leader: Candidate, others: Sequence[Candidate], metric: str) -> list[ComparedCandidate]:
    import numpy as np

    columns = {}
    for each in (leader, *others):
        found = metric_columns(metric, each.scores) if each.scores else None
        if found:
            columns[each.trial.trial_id] = np.array(found)
    own = columns[leader.trial.trial_id]
    known = [each for each in others if columns.get(each.trial.trial_id, own[:, :0]).shape == own.shape]
    stacked = np.stack([own, *(columns[each.trial.trial_id] for each in known)])  # (candidates, 2, rows)
    rows = stacked.shape[2]
    drawn = []
    for counts in resampled_counts(rows):
        above, below = (stacked[:, part] @ counts.T for part in (0, 1))
        drawn.append(above / below)
    values = np.concatenate(drawn, axis=1)  # (candidates, resamples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[1:] - values[0], (tail, 1 - tail), axis=1)
    whole = stacked.sum(axis=2)
    differences = whole[1:, 0] / whole[1:, 1] - whole[0, 0] / whole[0, 1]
    return [
        ComparedCandidate(*each) for each in zip(known, differences.tolist(), low.tolist(), high.tolist(), strict=True)
    ]
