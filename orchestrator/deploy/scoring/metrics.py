"""Metrics besides the loss: perplexity, and comparisons of generated answers with the expected ones."""

import math
from collections.abc import Sequence
from typing import Literal, assert_never, get_args

from orchestrator.adapters.generate import matches
from orchestrator.spec.optional_packages import require_package

Metric = Literal["loss", "perplexity", "exact_match", "rouge", "bleu"]
METRICS: tuple[Metric, ...] = get_args(Metric)

GENERATED: tuple[Metric, ...] = ("exact_match", "rouge", "bleu")
"""Metrics that need generated answers."""

_PACKAGES: dict[Metric, str] = {"rouge": "rouge_score", "bleu": "sacrebleu"}


def require_packages(metrics: Sequence[Metric]) -> None:
    """Check that the packages of these metrics are installed, before any model is loaded.

    Raises:
        RequestError: a package is missing.
    """
    for metric in metrics:
        if metric in _PACKAGES:
            require_package(_PACKAGES[metric], f"metric {metric}", "metrics")


def perplexity(loss: float) -> float:
    """Return the perplexity of a mean loss per token, in nats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def answer_metrics(answers: Sequence[str], expected: Sequence[str], metrics: Sequence[Metric]) -> dict[str, float]:
    """Compute the metrics that need answers.

    Returns:
        `exact_match` (share of correct answers), `rougeL` (mean F1 by rouge-score, 0 to 1) and `bleu` (corpus BLEU by
        sacrebleu, 0 to 100), as far as requested.
    """
    values: dict[str, float] = {}
    for metric in METRICS:
        if metric not in metrics:
            continue
        match metric:
            case "loss" | "perplexity":
                pass
            case "exact_match":
                values["exact_match"] = sum(matches(answers, expected)) / len(expected)
            case "rouge":
                values["rougeL"] = _rouge_l(answers, expected)
            case "bleu":
                from sacrebleu import corpus_bleu

                values["bleu"] = corpus_bleu(list(answers), [list(expected)]).score
            case _:
                assert_never(metric)
    return values


def _rouge_l(answers: Sequence[str], expected: Sequence[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(other, one)["rougeL"].fmeasure for one, other in zip(answers, expected, strict=True)]
    return float(sum(scores) / len(scores))
