"""What is said of values that were tried unevenly, and of tied fields."""

from pathlib import Path
from typing import Any

from planted import SPACE, plant

from orchestrator.analysis.coverage import say_coverage, say_tied
from orchestrator.analysis.sweep_data import SweepData, read_data
from orchestrator.analysis.verdict import find_verdict
from orchestrator.record import SweepPaths, TrialResult, read_sweep, write_record
from orchestrator.record.checked import read_record

MATTERED = 2


def data_of(paths: SweepPaths) -> SweepData:
    return read_data(read_sweep(paths.root))


def set_values(paths: SweepPaths, values: list[dict[str, Any]]) -> None:
    """Give the trials these searched values, in order."""
    record = read_sweep(paths.root)
    for name, each in zip(sorted(paths.trial_ids()), values, strict=True):
        file = paths.trial(name).result
        result = read_record(TrialResult, file)
        write_record(file, result.model_copy(update={"config": record.info.spec.trial_config(each)}))


def test_rare_values_are_counted_in_words(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 10)
    ranks, rates = [8, *[32] * 9], [*[2e-4] * 9, 9e-3]
    values = [
        {"training.learning_rate": rate, "lora.rank": rank, "lora.dropout": 0.01 * i}
        for i, (rank, rate) in enumerate(zip(ranks, rates, strict=True))
    ]
    set_values(paths, values)
    data = data_of(paths)
    (sentence,) = say_coverage(data)
    assert "lora.rank: 0 trials at 4, 1 at 8, 0 at 16, 9 at 32" in sentence
    rate = "training.learning_rate: 9 trials in the lowest third of its range, 0 in the middle third, 1 in the highest"
    assert rate in sentence
    assert "lora.dropout" not in sentence
    assert sentence in find_verdict(data).answers[MATTERED].sentences


def test_evenly_tried_values_and_few_trials_are_not_worth_a_sentence(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 8)
    values = [
        {"training.learning_rate": 1e-4 * 10 ** (2 * i / 7), "lora.rank": [4, 8, 16, 32][i % 4], "lora.dropout": i / 80}
        for i in range(8)
    ]
    set_values(paths, values)
    assert list(say_coverage(data_of(paths))) == []
    assert list(say_coverage(data_of(plant(tmp_path / "few", 5)))) == []


def test_tied_fields_are_named_with_the_field_that_they_follow(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 8, space=SPACE, tied={"lora.alpha": "2 * lora.rank"})
    data = data_of(paths)
    (sentence,) = say_tied(data)
    assert sentence == (
        "lora.alpha is tied: it is always 2 * lora.rank. So lora.rank moves with lora.alpha, and their effects cannot "
        "be told apart."
    )
    assert sentence in find_verdict(data).answers[MATTERED].sentences
    assert list(say_tied(data_of(plant(tmp_path / "free", 8)))) == []
