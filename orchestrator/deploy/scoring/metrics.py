"""What is measured of a form beside its loss: perplexity, and its answers against those that are wanted."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from orchestrator.adapters.generate import matches
from orchestrator.spec.optional_packages import require_package

Metric = Literal["loss", "perplexity", "exact_match", "rouge", "bleu"]
METRICS: tuple[Metric, ...] = get_args(Metric)

GENERATED: tuple[Metric, ...] = ("exact_match", "rouge", "bleu")
"""Those that need answers."""

_PACKAGES: dict[Metric, str] = {"rouge": "rouge_score", "bleu": "sacrebleu"}


def require_packages(metrics: Sequence[Metric]) -> None:
    """Find out before anything is loaded whether what these metrics need is installed.

    Raises:
        RequestError: a package is missing.
    """
    for metric in metrics:
        if metric in _PACKAGES:
            require_package(_PACKAGES[metric], f"metric {metric}", "metrics")


def perplexity(loss: float) -> float:
    """Of a mean loss a token, in nats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def answer_metrics(said: Sequence[str], wanted: Sequence[str], metrics: Sequence[Metric]) -> dict[str, float]:
    """Values of those metrics that need answers: `exact_match` (a share), `rougeL` (mean F1 by rouge-score, 0 to 1),
    `bleu` (corpus BLEU by sacrebleu, 0 to 100)."""
    values: dict[str, float] = {}
    if "exact_match" in metrics:
        values["exact_match"] = sum(matches(said, wanted)) / len(wanted)
    if "rouge" in metrics:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        each = [scorer.score(other, one)["rougeL"].fmeasure for one, other in zip(said, wanted, strict=True)]
        values["rougeL"] = sum(each) / len(each)
    if "bleu" in metrics:
        from sacrebleu import corpus_bleu

        values["bleu"] = corpus_bleu(list(said), [list(wanted)]).score
    return values
