"""What is said of a sweep whose finalists ran again with other seeds."""

import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from planted import plant, plant_repeats

from orchestrator.analysis.sweep_data import SweepData, read_data
from orchestrator.analysis.verdict import find_verdict
from orchestrator.record import read_sweep

COST = 5


@pytest.fixture
def repeated(tmp_path: Path) -> SweepData:
    """A sweep of four trials without an effect, each of which ran again; its first loses over seeds."""
    paths = plant(tmp_path / "s", 4, stops=False, effect=0.0, repeats=2)
    plant_repeats(paths, 4, read_sweep(paths.root).trials()[0].trial_id, effect=0.0)
    return read_data(read_sweep(paths.root))


def test_the_cost_says_which_counts_include_the_repeats(repeated: SweepData) -> None:
    verdict = find_verdict(repeated)
    sentences = verdict.answers[COST].sentences
    assert sentences[0].endswith("; 4 runs of finalists with other seeds included.")
    assert "tokens and 2m40s of trials' work" in sentences[0]
    assert sentences[1] == "The winner's own run (without its repeats) took 12% of the trials' work."


def test_tied_finalists_are_advised_more_seeds_in_a_new_sweep(repeated: SweepData) -> None:
    assert repeated.choice is not None
    recommendation = repeated.choice.recommendation
    tied = [each.candidate.trial for each in recommendation.tied]
    assert tied
    (step,) = [each for each in find_verdict(repeated).next_steps if "search.repeats=5" in each.command]
    assert step.why.startswith(f"{len(tied)} trials are tied with the winner. Resume cannot add seeds")
    sets = [word for before, word in pairwise(shlex.split(step.command)) if before == "--set"]
    values = {name: yaml.safe_load(value) for name, _, value in (each.partition("=") for each in sets)}
    space = repeated.info.spec.search.space
    points = [{name: trial.config.varied[name] for name in space} for trial in (recommendation.leader.trial, *tied)]
    assert values["search.first"] == points
    assert values["search.num_trials"] == len(points)
    assert values["scheduler"] == {"kind": "none"}
    assert f"It tries only the {len(points)} best tied points." in step.why


def test_searches_further_on_are_alternatives_and_the_total_is_explained(tmp_path: Path) -> None:
    verdict = find_verdict(read_data(read_sweep(plant(tmp_path / "s", 8, effect=0.0).root)))
    (more,) = [step for step in verdict.next_steps if "--trials 16" in step.command]
    assert "run 8 more trials of this search (--trials is the new total)" in more.why
    first = verdict.next_steps.index(more)
    assert ("alternative to suggestion 1" in more.why) == (first > 0)
