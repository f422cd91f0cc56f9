"""Finalists, forms, metrics and rows are found or rejected before a model is loaded."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from orchestrator.adapters.bundle import SCORES
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.find import find_adapter
from orchestrator.deploy.scoring.evaluate import ScoredRows, evaluate, find_finalists, new_report, pick, rows_of_file
from orchestrator.deploy.scoring.forms import FORMS
from orchestrator.deploy.scoring.metrics import METRICS
from orchestrator.errors import DataError, RecordError, RequestError
from orchestrator.record import RowScores, SweepPaths, read_result, write_record
from orchestrator.spec import parse_spec


@pytest.fixture
def sweep(tmp_path: Path, make_sweep: Callable[..., SweepPaths]) -> SweepPaths:
    """A sweep of four trials, one still running; the weights of the adapters are empty files."""
    trials = {"a": ("COMPLETE", 0.5), "b": ("STOPPED", 0.3), "c": ("COMPLETE", 0.4), "d": ("RUNNING", 0.1)}
    paths = make_sweep(tmp_path / "runs" / "one", trials)
    for trial in trials:
        (paths.trial(trial).adapter(7) / "adapter_config.json").write_text("{}")
        (paths.trial(trial).adapter(7) / "adapter_model.safetensors").touch()
    return paths


def test_finalists_are_the_best_finished_trials(sweep: SweepPaths) -> None:
    found = find_finalists("one", str(sweep.root.parent), top=2)
    assert [each.name for each in found] == ["b", "c"]
    assert [each.folder for each in found] == [sweep.trial(name).adapter(7) for name in "bc"]
    assert len(find_finalists(str(sweep.root), "elsewhere", top=9)) == 3


def test_the_recommended_trial_is_always_a_finalist(sweep: SweepPaths) -> None:
    for name, size in (("a", 100), ("b", 900), ("c", 800)):
        trial = sweep.trial(name)
        result = read_result(trial).model_copy(update={"applied": {"num_trainable_parameters": size}})
        write_record(trial.result, result)
        scores = RowScores(losses=[1.0, 2.0] * 5, hits=[1] * 10, tokens=[4] * 10)  # the same for all: tied
        (trial.adapter(7) / SCORES).write_text(scores.model_dump_json())
    assert [each.name for each in find_finalists(str(sweep.root), "runs", top=2)] == ["b", "c", "a"]


def test_an_incomplete_finalist_is_reported(sweep: SweepPaths) -> None:
    (sweep.trial("c").adapter(7) / "adapter_model.safetensors").unlink()
    with pytest.raises(RecordError, match=r"adapter_model\.safetensors is missing"):
        find_finalists(str(sweep.root), "runs", top=2)


def test_neither_a_sweep_nor_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="contains neither a sweep"):
        find_finalists(str(tmp_path), "runs", top=2)


def test_names_are_unique_and_in_order() -> None:
    assert pick("merged, adapter,merged", FORMS, "--as") == ["merged", "adapter"]


@pytest.mark.parametrize(
    ("given", "known", "option"),
    [("merge", FORMS, "--as"), ("loss,", METRICS, "--metrics"), ("", METRICS, "--metrics")],
)
def test_an_unknown_name_is_rejected_with_the_valid_ones(given: str, known: tuple[str, ...], option: str) -> None:
    with pytest.raises(RequestError, match="is unknown; choose from") as caught:
        pick(given, known, option)
    assert option in caught.value.message
    assert all(name in caught.value.message for name in known)


@pytest.fixture
def adapter(tmp_path: Path, document: dict[str, Any]) -> AdapterRef:
    """An adapter on the embedded base, trained with truncate=error."""
    data = {"source": "rows.jsonl", "format": "text", "max_length": 8, "truncate": "error"}
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "trial.json").write_text(parse_spec(document | {"data": data}).trial_config({}).model_dump_json())
    return find_adapter(str(folder), "runs")


def test_rows_that_are_too_long_are_named(adapter: AdapterRef, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("1", "1 2 3 4 5 6 7 8 9")))
    with pytest.raises(DataError, match=r"^\S+rows\.jsonl:2: has 19 tokens, more than data\.max_length=8\n"):
        rows_of_file(adapter, file)
    assert len(rows_of_file(adapter, file, limit=1).tokens) == 1


def test_csv_rows_are_read_with_the_delimiter_of_training(adapter: AdapterRef, tmp_path: Path) -> None:
    assert adapter.config is not None
    data = adapter.config.data.model_copy(update={"delimiter": ";"})
    ours = replace(adapter, config=adapter.config.model_copy(update={"data": data}))
    (tmp_path / "rows.csv").write_text("id;text\n1;2, 3\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "2, 3"}\n')
    found = [rows_of_file(ours, tmp_path / name).tokens for name in ("rows.csv", "rows.jsonl")]
    assert found[0] == found[1]


def test_rows_of_a_saved_dataset_come_from_the_split_train(adapter: AdapterRef, tmp_path: Path) -> None:
    parts = {"test": ["1"], "train": ["1", "2"]}
    saved = DatasetDict({split: Dataset.from_dict({"text": rows}) for split, rows in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    assert len(rows_of_file(adapter, tmp_path / "saved").tokens) == 2


def test_simultaneous_evaluations_have_different_reports(sweep: SweepPaths) -> None:
    reports = [new_report(sweep) for _ in range(100)]
    assert len(set(reports)) == 100
    assert not sweep.evaluations.exists(), "nothing is written before the first measurement"


def test_answers_need_prompts() -> None:
    text = ScoredRows([{"input_ids": [1, 2], "labels": [1, 2]}], [], "rows.jsonl", are_own=False)
    with pytest.raises(RequestError, match=r"metrics loss, bleu: rows of data\.format text have no prompt"):
        evaluate([], text, ["loss", "bleu"])
