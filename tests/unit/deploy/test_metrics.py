"""Metrics of answers, held against values worked out by hand; packages that are missing."""

import math
import sys

import pytest

from orchestrator.adapters.generate import matches
from orchestrator.deploy.scoring.harness import open_harness
from orchestrator.deploy.scoring.metrics import compare, perplexity, require_packages
from orchestrator.errors import RequestError

WANTED = ["the cat sat on the mat", "four plus four is eight"]


def test_perplexity() -> None:
    assert perplexity(math.log(2)) == pytest.approx(2)
    assert perplexity(1e4) == math.inf


def test_exact_match_does_not_count_space_at_the_ends() -> None:
    said = [" the cat sat on the mat\n", "four plus four is Eight"]
    assert matches(said, WANTED) == [True, False]
    assert compare(said, WANTED, ["exact_match"]) == {"exact_match": 0.5}


def test_rouge_is_the_mean_f1_of_longest_common_subsequences() -> None:
    # "the cat on mat": 4 of 4 words said, 4 of 6 wanted; nothing in common in the second.
    found = compare(["the cat on mat", "nothing"], WANTED, ["rouge"])
    assert found == {"rougeL": pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6) / 2)}


def test_bleu_is_of_the_corpus_and_from_0_to_100() -> None:
    assert compare(WANTED, WANTED, ["bleu"])["bleu"] == pytest.approx(100)
    short = ["the cat sat on the", "four plus four is eight"]  # all right, but 10 words for 11
    assert compare(short, WANTED, ["bleu"])["bleu"] == pytest.approx(100 * math.exp(1 - 11 / 10))
    said = ["the cat sat on the mat", "four plus four eight is"]
    # All words, and of the pairs, triples and quadruples those that lie before the two that changed places.
    precision = [11 / 11, 7 / 9, 5 / 7, 3 / 5]
    assert compare(said, WANTED, ["bleu"])["bleu"] == pytest.approx(100 * math.prod(precision) ** 0.25)


@pytest.mark.parametrize(("metric", "package"), [("rouge", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_missing_package_is_told_with_what_installs_it(
    metric: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_packages(["loss", "exact_match", metric])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RequestError, match=f"metric {metric} needs the package {package}") as told:
        require_packages(["loss", "exact_match", metric])
    assert "[metrics]" in told.value.remedy


def test_the_harness_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RequestError, match="--tasks needs the package lm_eval") as told:
        open_harness(["hellaswag"])
    assert "[harness]" in told.value.remedy
