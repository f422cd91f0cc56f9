"""Which adapter to take: the best, those that cannot be told apart from it, and the cheapest of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.errors import RequestError
from orchestrator.record import RowScores, TrialResult

Mode = Literal["min", "max"]

SIZE = "size"
"""Objective beside the metrics: parameters of the adapter, the fewer the better."""

RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 10
"""Rows: of fewer, resampling says nothing."""
_BLOCK = 1 << 24
"""Counts that are held at once."""


@dataclass(frozen=True)
class Candidate:
    """A finished trial at its best evaluation."""

    trial: TrialResult
    scores: RowScores | None
    """Of the held-out rows; None where its adapter does not say."""

    def value(self, metric: str) -> float | None:
        """Of a metric, or of `SIZE`; None where it was not measured."""
        if metric == SIZE:
            return self.trial.num_parameters
        return self.trial.best.values.get(metric) if self.trial.best else None

    @property
    def cost(self) -> float:
        """Parameters of its adapter, by which the cheapest is recommended; infinite where they are not known."""
        return self.trial.num_parameters or float("inf")


@dataclass(frozen=True)
class ComparedCandidate:
    """A candidate beside the leader."""

    candidate: Candidate
    difference: float
    """Its value minus the leader's."""
    low: float
    high: float
    """Bounds of the difference over resampled rows."""

    @property
    def is_tied(self) -> bool:
        """Whether the rows leave it open which of the two is better."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Recommendation:
    """What was compared, and what came of it."""

    metric: str
    mode: Mode
    leader: Candidate
    rivals: list[ComparedCandidate]
    """All others whose rows are known, best first."""
    recommended: Candidate
    num_compared: int
    """Candidates, the leader included."""
    why_not_compared: str | None
    """Why nothing is known of ties with any of them."""

    @property
    def tied(self) -> list[ComparedCandidate]:
        """Those that cannot be told apart from the leader, best first."""
        return [rival for rival in self.rivals if rival.is_tied]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
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
            "why_not_compared": self.why_not_compared,
        }


def choose(candidates: Sequence[Candidate], metric: str, mode: Mode, strict: bool = False) -> Recommendation:
    """The leader by `metric`, and of those that cannot be told apart from it the one with the fewest parameters.

    Two candidates are compared by a paired bootstrap (Efron and Tibshirani 1993; Koehn 2004 for paired rows): held-out
    rows are drawn with replacement, the same for both, and the metric of each computed anew. They are tied where zero
    lies within the middle `CONFIDENCE` of the differences.

    Args:
        candidates: at least one.
        metric: that each is measured by.
        mode: which end of it is better.
        strict: recommend the leader, whatever is tied with it.

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
    """Those that have the metric, best first.

    Raises:
        RequestError: none has it.
    """
    measured = [each for each in candidates if each.value(metric) is not None]
    if not measured:
        known = sorted({name for each in candidates if each.trial.best for name in each.trial.best.values} | {SIZE})
        raise RequestError(f"--metric {metric}: no finished trial has it", f"Measured were: {', '.join(known)}.")
    sign = 1 if mode == "min" else -1
    return sorted(measured, key=lambda each: sign * (each.value(metric) or 0.0))


def why_it_may_differ(choice: Recommendation, lost: Candidate, ranked: Sequence[Candidate], strict: bool) -> str | None:
    """Why another one might have been recommended, had this candidate been among them; None where it could not.

    Args:
        choice: made without it.
        lost: one whose adapter is damaged, and its rows with it.
        ranked: all, it too, by `rank`.
        strict: how the choice was made.
    """
    places = {each.trial.trial_id: place for place, each in enumerate(ranked)}
    place, recommended = places[lost.trial.trial_id], choice.recommended
    if place < places[choice.leader.trial.trial_id]:
        return "it leads"
    is_dearer = (lost.cost, place) > (recommended.cost, places[recommended.trial.trial_id])
    if strict or choice.why_not_compared or is_dearer:
        return None
    return "it would be taken if it were tied with the leader, which only its rows tell (`best --strict` does not ask)"


def pareto(candidates: Sequence[Candidate], objectives: dict[str, Mode]) -> list[Candidate]:
    """Those that no other candidate beats in one objective without losing in another, best in the first one first."""
    first, mode = next(iter(objectives.items()))
    able = [each for each in rank(candidates, first, mode) if all(each.value(name) is not None for name in objectives)]

    def costs(candidate: Candidate) -> list[float]:
        signs = [1 if mode == "min" else -1 for mode in objectives.values()]
        return [sign * (candidate.value(name) or 0.0) for sign, name in zip(signs, objectives, strict=True)]

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [each for each in able if not any(beats(costs(other), costs(each)) for other in able)]


def _columns(metric: str, scores: RowScores) -> tuple[list[float], list[float]] | None:
    """Per row, what a metric is the ratio of; None for one that rows do not tell."""
    if metric == "eval/loss":
        return scores.losses, [float(each) for each in scores.tokens]
    if metric == "eval/token_accuracy":
        return [float(each) for each in scores.hits], [float(each) for each in scores.tokens]
    if metric == "eval/exact_match" and scores.answers:
        return [float(each) for each in scores.answers], [1.0] * len(scores.answers)
    return None


def _why_not_compared(leader: Candidate, metric: str) -> str | None:
    if metric == SIZE:
        return "sizes are exact"
    if leader.scores is None:
        return "its adapter does not hold the scores of single rows"
    found = _columns(metric, leader.scores)
    if found is None:
        return f"{metric} of single rows was not kept"
    return None if len(found[0]) >= FEWEST else f"{len(found[0])} held-out rows are too few to tell"


def _compare(leader: Candidate, others: Sequence[Candidate], metric: str) -> list[ComparedCandidate]:
    import numpy as np

    columns = {}
    for each in (leader, *others):
        found = _columns(metric, each.scores) if each.scores else None
        if found:
            columns[each.trial.trial_id] = np.array(found)
    own = columns[leader.trial.trial_id]
    known = [each for each in others if columns.get(each.trial.trial_id, own[:, :0]).shape == own.shape]
    stacked = np.stack([own, *(columns[each.trial.trial_id] for each in known)])  # (candidates, 2, rows)
    rows = stacked.shape[2]
    random, each_block, drawn = np.random.default_rng(0), max(1, _BLOCK // rows), []
    for start in range(0, RESAMPLES, each_block):
        counts = random.multinomial(rows, np.full(rows, 1 / rows), size=min(each_block, RESAMPLES - start))
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
